"""Pictures from a path, URL or object to RGB."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import re
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

ImageSource: TypeAlias = str | Path | BinaryIO | Image.Image
Alpha: TypeAlias = Literal["white", "drop"]

MIB = 1 << 20
# What PIL would open further needs outside programs (EPS, WMF) or is no picture that people send.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# PIL reports damaged files with any of these.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError, IndexError)


class ImageError(ValueError):
    """A picture that cannot be used; the message says which one and why."""


def load_image(
    source: ImageSource,
    *,
    alpha: Alpha = "white",
    timeout_s: float = 20,
    max_bytes: int = 32 * MIB,
    max_pixels: int = 100_000_000,
) -> Image.Image:
    """Open a picture as RGB.

    `source` is a path, an http(s) or data: URL, a binary file object or a PIL image. `timeout_s` is the time that a download
    may take in all, `max_bytes` the most that it (or a data: URL) may hold. The first frame of an animation is taken; EXIF
    orientation is not applied, as in the processors of every family. 16-bit greyscale is scaled to 8 bits, where PIL would
    clip it to white. `alpha` (ImageFacts.alpha) is what becomes of transparent parts: "white" lays them over white
    (transformers 5.23, image_transforms.convert_to_rgb), "drop" shows their hidden colours (Qwen-VL).

    The result may be given to `load_image` again and stays what it is.

    Addresses are not filtered: a service that passes on URLs of strangers must do that itself.

    Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture", max_pixels, alpha)
    if isinstance(source, str):
        name = source if len(source) <= 100 else f"{source[:97]}..."
        if source.startswith("data:"):
            return _open(io.BytesIO(_decode_data_url(source, name, max_bytes)), name, max_pixels, alpha)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
            return _open(io.BytesIO(_download(source, name, timeout_s, max_bytes)), name, max_pixels, alpha)
        return _open_path(Path(source), max_pixels, alpha)
    if isinstance(source, Path):
        return _open_path(source, max_pixels, alpha)
    if hasattr(source, "read"):
        return _open(source, str(getattr(source, "name", "the file object")), max_pixels, alpha)
    raise ImageError(f"a picture was given as {type(source).__name__}; expected a path, a URL, a binary file or a PIL image")


def _open_path(path: Path, max_pixels: int, alpha: Alpha) -> Image.Image:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; give the path or URL of a picture") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)!r} cannot be read ({error})") from error
    with file:
        return _open(file, str(path), max_pixels, alpha)


def _open(file: BinaryIO, name: str, max_pixels: int, alpha: Alpha) -> Image.Image:
    Image.init()
    try:
        image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is refused: {error}") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a known format ({', '.join(FORMATS)})") from None
    except DAMAGED as error:
        raise ImageError(f"{name} is damaged or not a picture ({error})") from error
    return _to_rgb(image, name, max_pixels, alpha)


def _to_rgb(image: Image.Image, name: str, max_pixels: int, alpha: Alpha) -> Image.Image:
    """Decode and convert; the size is checked before any pixel is decoded."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels; expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(f"{name} is {width} x {height} pixels, more than the {max_pixels} allowed; scale it down first")
    try:
        image.load()
        return _convert(image, alpha)
    except DAMAGED as error:
        raise ImageError(f"{name} is damaged or cut short ({error})") from error


def _convert(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL would clip every value above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if alpha == "white" and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    shown = image.convert("RGB")
    shown.info.pop("transparency", None)  # of a palette or a colour key; it would count again in the next conversion
    return shown


def _decode_data_url(url: str, name: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise ImageError(f"{name} is not a picture; expected data:image/...;base64,...")
    if len(body) * 3 // 4 > max_bytes + 2:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64 ({error})") from error


def _download(url: str, name: str, timeout_s: float, max_bytes: int) -> bytes:
    """Fetch in a thread of its own: a socket timeout bounds one read, not a server that sends a byte now and then."""
    request = _request(url, name)
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_fetch(request, name, timeout_s, max_bytes))
        except Exception as error:  # handed over to the caller, who sees it as it is
            result.set_exception(error)

    threading.Thread(target=work, daemon=True, name="staticvl-download").start()
    try:
        return result.result(timeout=timeout_s)
    except TimeoutError:
        raise ImageError(f"{name} did not arrive within {timeout_s:g} s") from None


def _request(url: str, name: str) -> urllib.request.Request:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(f"{name} has the scheme {scheme}; expected http or https, or a path")
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        _ = urllib.parse.urlsplit(quoted).port  # raises for one that is no port
        return urllib.request.Request(quoted, headers={"User-Agent": "staticvl"})
    except ValueError as error:
        raise ImageError(f"{name} is not a valid URL ({error})") from error


def _fetch(request: urllib.request.Request, name: str, timeout_s: float, max_bytes: int) -> bytes:
    deadline = time.monotonic() + timeout_s
    try:
        with _opener().open(request, timeout=timeout_s) as response:
            return _read(response, name, deadline, max_bytes)
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            target = error.headers.get("Location")
            raise ImageError(
                f"{name} redirects to {target}, which is not followed; expected http or https, without a loop"
            ) from None
        raise ImageError(f"{name} cannot be fetched: HTTP status {error.code} {error.reason}") from None
    except TimeoutError:
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise ImageError(f"{name} cannot be fetched: {error.reason}") from error
    except (http.client.HTTPException, OSError, UnicodeError) as error:
        raise ImageError(f"{name} cannot be fetched: {error or type(error).__name__}") from error


def _opener() -> urllib.request.OpenerDirector:
    """An opener for http and https alone: the default one also opens file, ftp and data."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _read(response: http.client.HTTPResponse, name: str, deadline: float, max_bytes: int) -> bytes:
    length = response.headers.get("Content-Length", "")
    parts, size = [], int(length) if length.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
            if time.monotonic() > deadline:
                raise TimeoutError
    if size > max_bytes:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    return b"".join(parts)
