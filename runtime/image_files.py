"""Pictures from a path, URL or object to RGB."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from .image_urls import MIB, ImageError, decode_data_url, download, short_name

__all__ = ["Alpha", "ImageError", "ImageSource", "load_image"]

ImageSource: TypeAlias = str | Path | BinaryIO | Image.Image
Alpha: TypeAlias = Literal["white", "drop"]

# What PIL would open further needs outside programs (EPS, WMF) or is no picture that people send.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# PIL reports damaged files with any of these.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError, IndexError)


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

    Addresses are not filtered: a service fetches what strangers name by image_urls.download with a `connect` of its own, and
    gives the bytes to this function.

    Raises ImageError.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture", max_pixels, alpha)
    if isinstance(source, str):
        name = short_name(source)
        if source.startswith("data:"):
            return _open(io.BytesIO(decode_data_url(source, max_bytes)), name, max_pixels, alpha)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
            return _open(io.BytesIO(download(source, timeout_s=timeout_s, max_bytes=max_bytes)), name, max_pixels, alpha)
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
