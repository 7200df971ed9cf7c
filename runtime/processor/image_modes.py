"""Images of any of Pillow's modes to RGB in 8 bits, and the rotation that EXIF states."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image

from .image_data import ImageError

Alpha: TypeAlias = Literal["white", "drop"]

ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # tags of TIFF
UNSIGNED, SIGNED = 1, 2  # SAMPLE_FORMAT
WHITE_IS_ZERO = 0  # PHOTOMETRIC
TURN = Image.Transpose
TURNS = {
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip


def orientation_of(image: Image.Image) -> Image.Transpose | None:
    """The rotation that EXIF or XMP states. None also where EXIF cannot be read: such a file is shown as it is stored.

    `image` must be loaded: Pillow turns TIFF by itself then, and removes the tag.
    """
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return None


def to_rgb(image: Image.Image, name: str, alpha: Alpha) -> Image.Image:
    """A new RGB image; raises ImageError, which calls it `name`, for values outside of every known range.

    Transparent parts: "white" lays them over white (transformers 5.23, image_transforms.convert_to_rgb), "drop" shows their
    hidden colours. More than 8 bits are scaled (`_shades`), where Pillow clips.
    """
    clear = "A" in image.getbands() or image.info.get("transparency") is not None
    if image.mode[0] in "IF":
        plain = Image.fromarray(_shades(image, name, alpha)).convert("RGB")
    elif alpha == "white" and clear:
        image = image.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    else:
        plain = image.convert("RGB")
    plain.info = {}  # transparency or an orientation would count again in the next conversion
    return plain


def _shades(image: Image.Image, name: str, alpha: Alpha) -> np.ndarray:
    """uint8 [H, W] of a grey image of more than 8 bits: the range that the file states, or where it states none the values."""
    values = np.asarray(image)
    if image.mode == "F":
        shades = _of_floats(values, name)
    else:
        if _tag(image, SAMPLE_FORMAT, SIGNED) == UNSIGNED and values.dtype == np.int32:
            values = values.view(np.uint32)  # Pillow has no mode for them
        shades = _of_integers(values, _bits(image, values), name)
    if _tag(image, PHOTOMETRIC, None) == WHITE_IS_ZERO:
        shades = 255 - shades
    key = image.info.get("transparency")
    if alpha == "white" and key is not None:
        shades = np.where(values == key, np.uint8(255), shades)
    return shades


def _bits(image: Image.Image, values: np.ndarray) -> int:
    """The number of bits of the values of a grey image."""
    signed = _tag(image, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    if image.mode.startswith("I;16") or image.format == "PPM":  # Pillow scales every PGM to 16 bits
        return int(_tag(image, BITS, 16))
    if _tag(image, BITS, 32) == 16:
        return 15 if signed else 16
    # 32 bits mostly hold values of fewer, and nothing in the file says so.
    most = int(values.max())
    return 8 if most < 1 << 8 else 16 if most < 1 << 16 else 32 if values.dtype == np.uint32 else 31


def _of_integers(values: np.ndarray, bits: int, name: str) -> np.ndarray:
    least, most = int(values.min()), int(values.max())
    shades = (values >> (bits - 8)).astype(np.uint8)
    if least < 0 or (most > 0 and bits > 16 and not shades.any()):
        raise ImageError(
            f"{name} has values from {least} to {most}; expected 0 to 255, 0 to 65535, or up to the largest of its "
            f"{values.dtype.itemsize * 8} bits; scale them first"
        )
    return shades


def _of_floats(values: np.ndarray, name: str) -> np.ndarray:
    least, most = float(values.min()), float(values.max())  # both NaN where any value is
    if not 0 <= least <= most <= 255:
        raise ImageError(f"{name} has values from {least:g} to {most:g}; expected 0 to 1, or 0 to 255; scale them first")
    return np.rint(values * 255 if most <= 1 else values).astype(np.uint8)


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    """The first value of a tag of a TIFF file; `default` where it has none, and for every other format."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value
