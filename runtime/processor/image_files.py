"""Images from a path, URL, bytes or object to RGB."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from PIL import BmpImagePlugin, IcoImagePlugin, Image, PngImagePlugin, UnidentifiedImageError

from ..shown import shown
from .image_data import ImageError, data_url_name, decode_base64, decode_data_url, is_data_url
from .image_memory import release_memory
from .image_modes import Alpha, orientation_of, to_rgb
from .image_urls import MIB, download
from .pillow_quiet import quiet_pillow

__all__ = ["Alpha", "ImageError", "ImageSource", "load_image"]

ImageSource: TypeAlias = str | Path | bytes | BinaryIO | Image.Image

# Further formats of PIL need external programs (EPS, WMF) or are uncommon.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class _Limits:
    """Limits on the size of one image, checked before anything is decoded."""

    pixels: int
    side: int
    ratio: int

    def check(self, name: str, size: tuple[int, int]) -> None:
        width, height = size
        what = f"{name} is {width} x {height} pixels"
        if width < 1 or height < 1:
            raise ImageError(f"{what}; expected at least 1 x 1")
        if width * height > self.pixels:
            raise ImageError(f"{what}, more than the {self.pixels} allowed; scale it down first")
        if max(size) > self.side or max(size) > min(size) * self.ratio:
            raise ImageError(
                f"{what}; expected sides of at most {self.side}, and at most {self.ratio} times as long as each other; cut it "
                "into parts first"
            )


def load_image(
    source: ImageSource,
    *,
    alpha: Alpha = "white",
    timeout_s: float = 20,
    max_bytes: int = 32 * MIB,
    max_pixels: int = 100_000_000,
    max_side: int = 65_535,
    max_ratio: int = 1000,
) -> Image.Image:
    """Open an image as RGB.

    `source` is a path, an http(s) or data: URL, base64, the bytes of a file, a binary file object or a PIL image. `timeout_s`
    is the time that a download may take in all, `max_bytes` the most that it (or text) may hold. `max_pixels`, `max_side`
    (pixels) and `max_ratio` (of the longer side to the shorter) are checked before anything is decoded.

    A file is turned as its EXIF orientation says; a PIL image stays as it is: both as transformers does. Of an animation the
    first frame counts. More than 8 bits are scaled to 8, where PIL would clip them (image_modes.py). `alpha`
    (ImageProcessorConfig.alpha) is what becomes of transparent parts: "white" lays them over white, "drop" shows their hidden
    colours (Qwen-VL).

    The result may be given to `load_image` again and does not change.

    Addresses are not filtered: a service fetches what strangers name by image_urls.download with a `connect` of its own, and
    gives the bytes to this function.

    Raises ImageError.
    """
    limits = _Limits(max_pixels, max_side, max_ratio)
    if isinstance(source, Image.Image):
        with quiet_pillow:
            return _decoded(source, "the image", limits, alpha)
    file, name = _file_of(source, timeout_s, max_bytes)
    try:
        with quiet_pillow:
            image = _upright(file, name, limits, alpha)
    finally:
        if file is not source:
            file.close()
    release_memory(image.width * image.height)  # of the file's own mode
    return image


def _upright(file: BinaryIO, name: str, limits: _Limits, alpha: Alpha) -> Image.Image:
    """The image in a file as RGB, turned as a person sees it."""
    image = _opened(file, name, limits)
    plain, turn = _decoded(image, name, limits, alpha), orientation_of(image)
    return plain if turn is None else plain.transpose(turn)


def _file_of(source: ImageSource, timeout_s: float, max_bytes: int) -> tuple[BinaryIO, str]:
    """A file that holds the image, and its name for error messages."""
    if isinstance(source, str):
        return _file_of_text(source, timeout_s, max_bytes)
    if isinstance(source, Path):
        return _open_path(source), shown(source)
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source), "the image"
    if hasattr(source, "read"):
        return cast(BinaryIO, source), shown(getattr(source, "name", "the file object"))
    kind = type(source).__name__
    raise ImageError(f"an image was given as {kind}; expected a path, a URL, bytes, a binary file or a PIL image")


def _file_of_text(text: str, timeout_s: float, max_bytes: int) -> tuple[BinaryIO, str]:
    """A text is a URL, the path of a file that is there, or an image in base64."""
    if not text:
        raise ImageError("an image was given as an empty text; expected the path or URL of an image")
    if is_data_url(text):
        return io.BytesIO(decode_data_url(text, max_bytes)), data_url_name(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return io.BytesIO(download(text, timeout_s=timeout_s, max_bytes=max_bytes)), shown(text)
    try:
        return _open_path(Path(text)), shown(text)
    except ImageError:
        data = _base64_image(text, max_bytes)
        if data is None:
            raise
        return io.BytesIO(data), "the base64 text"


def _open_path(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise ImageError(f"{shown(path)} does not exist; give the path or URL of an image") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path, which may be long
        raise ImageError(f"{shown(repr(str(path)))} cannot be read ({reason})") from None


def _base64_image(text: str, max_bytes: int) -> bytes | None:
    """The image that a text holds in base64 without "data:", if it does; raises ImageError where it is damaged or too large."""
    name = "the base64 text"
    try:
        head = decode_base64(re.sub(r"\s", "", text[:100])[:32], name, max_bytes)[:16]
    except ImageError:
        return None
    accepts = (Image.OPEN[form][1] for form in _formats())
    if len(head) < 16 or not any(accept and accept(head) is True for accept in accepts):
        return None
    return decode_base64(text, name, max_bytes)


def _formats() -> list[str]:
    """FORMATS that this build of Pillow opens."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _opened(file: BinaryIO, name: str, limits: _Limits) -> Image.Image:
    try:
        if not hasattr(file, "seekable") or not file.seekable():
            file = io.BytesIO(file.read())
        _check_icon(file, name, limits)
        return Image.open(file, formats=_formats())
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is refused: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # decoders raise anything for a damaged file
        raise ImageError(f"{name} is damaged or not an image ({_reason(error)})") from error


def _check_icon(file: BinaryIO, name: str, limits: _Limits) -> None:
    """The size of the image in an icon: Pillow decodes it as it opens the file, and the icon's head may state another size."""
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    if head != b"\0\0\1\0":
        return
    file.seek(IcoImagePlugin.IcoFile(file).entry[0].offset)
    if file.read(8) == PNG_HEAD:
        file.seek(-8, io.SEEK_CUR)
        size = PngImagePlugin.PngImageFile(file).size
    else:
        file.seek(-8, io.SEEK_CUR)
        width, height = BmpImagePlugin.DibImageFile(file).size
        size = width, height // 2  # the other half is its mask
    limits.check(name, size)
    file.seek(0)


def _decoded(image: Image.Image, name: str, limits: _Limits, alpha: Alpha) -> Image.Image:
    """As RGB; the size is checked before any pixel is decoded."""
    limits.check(name, image.size)
    try:
        image.load()
        return to_rgb(image, name, alpha)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels, which do not fit in memory") from None
    except Exception as error:  # decoders raise anything for a damaged file
        raise ImageError(f"{name} is damaged or cut short ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return shown(error) or type(error).__name__
