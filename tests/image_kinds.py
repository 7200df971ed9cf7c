"""Image files of every kind that is loaded by a rule of its own, and what the rule says where transformers has another."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIZE = (45, 31)  # (width, height); no orientation leaves it as it is


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A file. `clear`: parts of it are transparent. `shades`, uint8 [H, W]: what its grey values of more than 8 bits are on
    the scale of 8, stated by numpy; transformers clips them."""

    name: str
    data: bytes
    clear: bool = False
    shades: np.ndarray | None = None


def colours(seed: int = 7) -> Image.Image:
    """Coarse noise in RGB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 11, 3), np.uint8)
    return Image.fromarray(coarse).resize(SIZE, Image.Resampling.BILINEAR)


def written(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned_kinds() -> Iterator[Kind]:
    """Every orientation in every container that carries one."""
    containers = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
    for form, options in containers.items():
        for orientation in range(1, 9):
            data = written(colours(), form, exif=oriented(orientation), **options)
            yield Kind(f"orientation {orientation} {form}", data)
    yield Kind("orientation 6 TIFF, packed", written(colours(), "TIFF", exif=oriented(6), compression="tiff_lzw"))
    yield Kind("orientation 8 MPO", written(colours(), "MPO", save_all=True, append_images=[colours(9)], exif=oriented(8)))
    yield Kind("orientation 5 AVIF", written(colours(), "AVIF", exif=oriented(5), quality=90))
    faded = _faded()
    yield Kind("orientation 6 RGBA PNG", written(faded, "PNG", exif=oriented(6)), clear=True)
    yield Kind("orientation 3 RGBA WebP", written(faded, "WEBP", exif=oriented(3), lossless=True), clear=True)
    deep = _deep()
    turned = np.rot90((deep >> 8).astype(np.uint8), k=-1)
    yield Kind("orientation 6 16-bit PNG", written(Image.fromarray(deep), "PNG", exif=oriented(6)), shades=turned)


def plain_kinds() -> Iterator[Kind]:
    """RGB without a rule of ours: transformers' loader is the reference."""
    image, palette = colours(), colours().quantize(16)
    lab = ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), lab, "RGB", "LAB")
    made = ImageCms.applyTransform(image, to_lab)
    assert made is not None
    frames = {"save_all": True, "append_images": [colours(9)]}
    yield Kind("grey JPEG", written(image.convert("L"), "JPEG"))
    yield Kind("CMYK JPEG", written(image.convert("CMYK"), "JPEG", quality=95))
    yield Kind("CMYK TIFF", written(image.convert("CMYK"), "TIFF"))
    yield Kind("YCbCr TIFF", written(image.convert("YCbCr"), "TIFF"))
    yield Kind("LAB TIFF", written(made, "TIFF"))
    yield Kind("grey PNG", written(image.convert("L"), "PNG"))
    yield Kind("palette PNG", written(palette, "PNG"))
    yield Kind("1-bit PNG", written(image.convert("1"), "PNG"))
    yield Kind("1-bit TIFF", written(image.convert("1"), "TIFF", compression="group4"))
    yield Kind("PBM", written(image.convert("1"), "PPM"))
    yield Kind("PGM", written(image.convert("L"), "PPM"))
    yield Kind("PPM", written(image, "PPM"))
    yield Kind("animated GIF", written(palette, "GIF", save_all=True, append_images=[colours(9).quantize(16)]))
    yield Kind("animated WebP", written(image, "WEBP", lossless=True, **frames))
    yield Kind("animated PNG", written(image, "PNG", **frames))
    yield Kind("TIFF of two pages", written(image, "TIFF", **frames))
    yield Kind("MPO", written(image, "MPO", **frames))
    yield Kind("AVIF", written(image, "AVIF", quality=90))
    yield Kind("BMP", written(image, "BMP"))
    yield Kind("DIB", written(image, "DIB"))
    yield Kind("JPEG 2000", written(image, "JPEG2000"))
    yield Kind("lossy WebP", written(image, "WEBP", quality=80))


def clear_kinds() -> Iterator[Kind]:
    """With transparent parts: laid over white by transformers' processors, dropped by its loader."""
    image, palette, faded = colours(), colours().quantize(16), _faded()
    yield Kind("RGBA PNG", written(faded, "PNG"), clear=True)
    yield Kind("RGBA WebP", written(faded, "WEBP", quality=80), clear=True)
    yield Kind("RGBA TIFF", written(faded, "TIFF"), clear=True)
    yield Kind("RGBA AVIF", written(faded, "AVIF", quality=90), clear=True)
    yield Kind("RGBA JPEG 2000", written(faded, "JPEG2000"), clear=True)
    yield Kind("grey with alpha PNG", written(faded.convert("LA"), "PNG"), clear=True)
    yield Kind("palette with a clear colour PNG", written(palette, "PNG", transparency=3), clear=True)
    yield Kind("palette with alpha PNG", written(palette, "PNG", transparency=bytes(range(0, 256, 16))), clear=True)
    yield Kind("colour key PNG", written(image, "PNG", transparency=image.getpixel((5, 5))), clear=True)
    yield Kind("GIF with a clear colour", written(palette, "GIF", transparency=3), clear=True)
    yield Kind("ICO", written(faded, "ICO", sizes=[(24, 24)]), clear=True)


def deep_kinds() -> Iterator[Kind]:
    """Grey of more than 8 bits, or of floats."""
    deep = _deep()
    high = (deep >> 8).astype(np.uint8)  # the high byte, as Pillow takes it of 16-bit colours
    yield Kind("16-bit PNG", written(Image.fromarray(deep), "PNG"), shades=high)
    yield Kind("16-bit TIFF", written(Image.fromarray(deep), "TIFF"), shades=high)
    yield Kind("16-bit JPEG 2000", written(Image.fromarray(deep), "JPEG2000"), shades=high)
    yield Kind("16-bit PGM", _pgm(deep, 65535), shades=high)
    dark = deep // 300  # at most 218 of 65535: black, though all of it fits in 8 bits
    yield Kind("dark 16-bit PGM", _pgm(dark, 65535), shades=np.zeros_like(high))
    twelve = deep >> 4
    yield Kind("12-bit PGM", _pgm(twelve, 4095), shades=(np.rint(twelve / 4095 * 65535) // 256).astype(np.uint8))
    yield Kind("12-bit TIFF", _tiff(_packed_12(twelve), 12, 1), shades=(twelve >> 4).astype(np.uint8))
    yield Kind("16-bit TIFF, white is zero", _tiff(deep.tobytes(), 16, 1, white_is_zero=True), shades=255 - high)
    yield Kind("signed 16-bit TIFF", _tiff((deep >> 1).tobytes(), 16, 2), shades=high)
    yield Kind("32-bit TIFF of 16-bit values", written(Image.fromarray(deep.astype(np.int32)), "TIFF"), shades=high)
    yield Kind("32-bit TIFF of 8-bit values", written(Image.fromarray(high.astype(np.int32)), "TIFF"), shades=high)
    wide = deep.astype(np.uint32) << 16
    yield Kind("unsigned 32-bit TIFF", _tiff(wide.tobytes(), 32, 1), shades=high)
    yield Kind("signed 32-bit TIFF", written(Image.fromarray((wide >> 1).astype(np.int32)), "TIFF"), shades=high)
    floats = deep.astype(np.float32) / 65535
    yield Kind("float TIFF to 1", written(Image.fromarray(floats), "TIFF"), shades=np.rint(floats * 255).astype(np.uint8))
    to_255 = floats * 255
    yield Kind("float TIFF to 255", written(Image.fromarray(to_255), "TIFF"), shades=np.rint(to_255).astype(np.uint8))
    yield Kind("PFM", written(Image.fromarray(floats), "PPM"), shades=np.rint(floats * 255).astype(np.uint8))


def all_kinds() -> list[Kind]:
    return [*turned_kinds(), *plain_kinds(), *clear_kinds(), *deep_kinds()]


def _faded() -> Image.Image:
    image = colours()
    image.putalpha(colours(8).convert("L"))
    return image


def _deep() -> np.ndarray:
    """uint16 [H, W] from 0 to 65535."""
    values = np.random.default_rng(3).integers(0, 65536, SIZE[::-1], np.uint16)
    values[0, :2] = 0, 65535
    return values


def _pgm(values: np.ndarray, largest: int) -> bytes:
    return b"P5 %d %d %d\n" % (values.shape[1], values.shape[0], largest) + values.astype(">u2").tobytes()


def _packed_12(values: np.ndarray) -> bytes:
    """Two values in three bytes; each row begins a byte."""
    bits = (values[:, :, None] >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(values), -1), axis=1).tobytes()


def _tiff(data: bytes, bits: int, sample_format: int, *, white_is_zero: bool = False) -> bytes:
    """A little-endian TIFF of one strip, for forms that Pillow reads and does not write."""
    tags = {
        256: SIZE[0], 257: SIZE[1], 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: SIZE[1],
        279: len(data), 339: sample_format,
    }  # fmt: skip
    at = 8 + len(data) + len(data) % 2
    head = b"II*\0" + at.to_bytes(4, "little") + data + bytes(len(data) % 2)
    entries = [b"".join(part.to_bytes(n, "little") for part, n in ((tag, 2), (4, 2), (1, 4), (value, 4)))
               for tag, value in tags.items()]  # fmt: skip
    return head + len(entries).to_bytes(2, "little") + b"".join(entries) + bytes(4)
