"""Pictures: from a path, URL or object to the uint8 square that the vision graph takes.

Legend: S side of the square; coordinates are (x, y) with the origin at the top left corner.
Rescaling and normalisation happen in the graph, so everything here stays uint8.
"""

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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from .artifact import ImageFacts

ImageSource: TypeAlias = str | Path | BinaryIO | Image.Image

MIB = 1 << 20
MAX_RESIZED_PIXELS = 400_000_000  # of the intermediate picture of to_pixels; only extreme aspect ratios come near
# What PIL would open further needs outside programs (EPS, WMF) or is no picture that people send.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# PIL reports damaged files with any of these.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError, IndexError)


class ImageError(ValueError):
    """A picture that cannot be used; the message says which one and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where the square that the model saw lies on the original picture, in pixels of the picture.

    A coordinate u, v in 0..1 of the square is the point `left + u * width`, `top + v * height`. With padding the square is
    larger than the picture (left or top is negative); with a centre crop it is smaller.
    """

    left: float
    top: float
    width: float
    height: float
    image_width: int
    image_height: int

    def point(self, u: float, v: float) -> tuple[float, float]:
        """Pixels of the original picture, not rounded; a point in the padding lies outside the picture."""
        return self.left + u * self.width, self.top + v * self.height


def load_image(
    source: ImageSource, *, timeout_s: float = 20, max_bytes: int = 32 * MIB, max_pixels: int = 100_000_000
) -> Image.Image:
    """Open a picture as RGB.

    `source` is a path, an http(s) or data: URL, a binary file object or a PIL image. `timeout_s` is the time that a download
    may take in all, `max_bytes` the most that it (or a data: URL) may hold. The first frame of an animation is taken; EXIF
    orientation is not applied, as in the CLIP and LLaVA processors. Transparent parts are laid over white (transformers 5.23,
    image_transforms.convert_to_rgb). 16-bit greyscale is scaled to 8 bits, where PIL would clip it to white.

    Addresses are not filtered: a service that passes on URLs of strangers must do that itself.

    Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture", max_pixels)
    if isinstance(source, str):
        name = source if len(source) <= 100 else f"{source[:97]}..."
        if source.startswith("data:"):
            return _open(io.BytesIO(_decode_data_url(source, name, max_bytes)), name, max_pixels)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
            return _open(io.BytesIO(_download(source, name, timeout_s, max_bytes)), name, max_pixels)
        return _open_path(Path(source), max_pixels)
    if isinstance(source, Path):
        return _open_path(source, max_pixels)
    if hasattr(source, "read"):
        return _open(source, str(getattr(source, "name", "the file object")), max_pixels)
    raise ImageError(f"a picture was given as {type(source).__name__}; expected a path, a URL, a binary file or a PIL image")


def _open_path(path: Path, max_pixels: int) -> Image.Image:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; give the path or URL of a picture") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)!r} cannot be read ({error})") from error
    with file:
        return _open(file, str(path), max_pixels)


def _open(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is refused: {error}") from error
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a picture in a known format ({', '.join(FORMATS)})") from None
    except DAMAGED as error:
        raise ImageError(f"{name} is damaged or not a picture ({error})") from error
    return _to_rgb(image, name, max_pixels)


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode and convert; the size is checked before any pixel is decoded."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width} x {height} pixels; expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(f"{name} is {width} x {height} pixels, more than the {max_pixels} allowed; scale it down first")
    try:
        image.load()
        return _convert(image)
    except DAMAGED as error:
        raise ImageError(f"{name} is damaged or cut short ({error})") from error


def _convert(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL would clip every value above 255 to white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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


def to_pixels(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    """The uint8 square [S, S, 3] of an RGB picture, equal to the last bit to the PIL processors of transformers.

    crop (CLIPImageProcessor): the shortest edge becomes S, the other int(S * long / short), then the middle is cut out.
    pad (LLaVA's expand2square): a square in the colour int(255 * mean) with the picture in its middle, then resized.

    Raises ImageError for a picture so narrow that the intermediate picture would not fit in memory.
    """
    side = facts.size
    if facts.mode == "pad":
        image = _pad_to_square(image, _pad_colour(facts))
    width, height = _resized(image.size, side)
    _check_pixels(width * height, image.size)
    resized = image.resize((width, height), resample=Image.Resampling(facts.resample))
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(resized.crop((left, top, left + side, top + side)))  # [S, S, 3]


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = size
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _pad_colour(facts: ImageFacts) -> tuple[int, int, int]:
    red, green, blue = facts.mean
    return int(red * 255), int(green * 255), int(blue * 255)


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    long = max(width, height)
    _check_pixels(long * long, image.size)
    square = Image.new("RGB", (long, long), colour)
    square.paste(image, ((long - width) // 2, (long - height) // 2))
    return square


def _check_pixels(count: int, size: tuple[int, int]) -> None:
    if count > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"a picture of {size[0]} x {size[1]} pixels is too narrow: scaling it needs {count} pixels, more than "
            f"{MAX_RESIZED_PIXELS}; cut it into parts first"
        )


def frame_of(size: tuple[int, int], facts: ImageFacts) -> Frame:
    """Where the square that `to_pixels` makes of a picture of `size` (width, height) lies on the picture."""
    width, height = size
    if facts.mode == "pad":
        long = max(size)
        left, top = -((long - width) // 2), -((long - height) // 2)
        return Frame(left=left, top=top, width=long, height=long, image_width=width, image_height=height)
    resized_width, resized_height = _resized(size, facts.size)
    x_scale, y_scale = width / resized_width, height / resized_height
    return Frame(
        left=(resized_width - facts.size) // 2 * x_scale,
        top=(resized_height - facts.size) // 2 * y_scale,
        width=facts.size * x_scale,
        height=facts.size * y_scale,
        image_width=width,
        image_height=height,
    )
