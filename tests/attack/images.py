"""Image files of thirteen formats, damaged, lying about their size, or hostile."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from staticvl.runtime.processor.images import load_image

from .case import Attempt, Kind
from .mutate import BYTES, shuffled

Make = Callable[[random.Random], Any]
SIZE = (61, 47)  # distinct, so that a header's numbers are found by their value
LIES = (0, 1, 48, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
FRAMED = ("GIF", "APNG", "MPO", "TIFF", "WEBP")
MODES = ("RGB", "RGBA", "L", "P", "1", "I;16", "CMYK", "LA")


def _saved(image: Image.Image, form: str, **options: Any) -> bytes | None:
    """None where the format has no such mode."""
    file = io.BytesIO()
    try:
        image.save(file, "PNG" if form == "APNG" else "PPM" if form == "PGM" else form, **options)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def _image(mode: str) -> Image.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "PGM", "AVIF", "JPEG2000", "ICO", "MPO", "APNG")


def samples() -> list[tuple[str, bytes]]:
    """A small file of each format, mode and kind of compression."""
    found: list[tuple[str, bytes | None]] = []
    for form in FORMATS:
        for mode in ("L", "I;16") if form == "PGM" else MODES:
            options: dict[str, Any] = {}
            if form in FRAMED:
                options = {"save_all": True, "append_images": [_image(mode).rotate(180)]}
            found.append((f"{form} {mode}", _saved(_image(mode), form, **options)))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4"):
        found.append(
            (f"TIFF {compression}", _saved(_image("1" if compression == "group4" else "RGB"), "TIFF", compression=compression))
        )
    found.append(("JPEG progressive", _saved(_image("RGB"), "JPEG", progressive=True, exif=bytes(Image.Exif().tobytes()))))
    return [(name, data) for name, data in found if data]


def size_lies(rng: random.Random, data: bytes) -> bytes:
    """Another number where the file has its width or height, in any form that it may be written in."""
    changed = data
    for number in SIZE if rng.random() < 0.5 else (rng.choice(SIZE),):
        lie = rng.choice(LIES)
        for form in ("<I", ">I", "<H", ">H"):
            most = 0xFFFF if form[1] == "H" else 0xFFFFFFFF
            places = [
                i for i in range(min(len(data), 2000)) if data[i : i + struct.calcsize(form)] == struct.pack(form, number)
            ]
            if places:
                place = rng.choice(places[:4])
                changed = changed[:place] + struct.pack(form, min(lie, most)) + changed[place + struct.calcsize(form) :]
                break
        changed = changed.replace(b"%d" % number, b"%d" % lie, 1) if data[:1] == b"P" else changed
    return _png_sums(changed)


def _png_sums(data: bytes) -> bytes:
    """The checksums of a PNG made right, so that a reader gets to what lies under them."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        parts.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts)


def resealed(rng: random.Random, data: bytes) -> bytes:
    return _png_sums(BYTES["flip"](rng, data))


CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {**BYTES, "size": size_lies, "resealed": resealed}


# ---- files that are hostile by design


def png(width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes], depth: int = 1, colour: int = 0) -> bytes:
    """A PNG whose chunks stand before its pixels; `rows` is what they unpack to."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in every
    )


def _packed() -> bytes:
    """200 MB of zeros."""
    return zlib.compress(bytes(200 << 20), 1)


TINY = png(1, 1, b"\0\0")
BOMBS: dict[str, Callable[[], bytes]] = {
    "a PNG of 30,000 x 30,000 in one bit": lambda: png(30_000, 30_000, bytes(30_000 * 3751)),
    "a PNG of 60,000 x 60,000 without rows": lambda: png(60_000, 60_000, b""),
    "a PNG that unpacks to more than it is large": lambda: png(8, 8, bytes(100 << 20)),
    "a PNG of 1 x 200,000": lambda: png(1, 200_000, bytes(2 * 200_000)),
    "a PNG of 200,000 x 1": lambda: png(200_000, 1, bytes(25_001)),
    "a PNG with a text that unpacks to 200 MB": lambda: png(1, 1, b"\0\0", (b"zTXt", b"Comment\0\0" + _packed())),
    "a PNG with a profile that unpacks to 200 MB": lambda: png(1, 1, b"\0\0", (b"iCCP", b"icc\0\0" + _packed())),
    "a PNG with international text that unpacks to 200 MB": lambda: png(1, 1, b"\0\0", (b"iTXt", b"k\0\1\0\0\0" + _packed())),
    "a PNG with a million chunks": lambda: TINY[:-12] + b"\0\0\0\0tEXt\xe2\x85\xb9\x9b" * 1_000_000 + TINY[-12:],
    "a PNG of palette without palette": lambda: png(4, 4, bytes(20), depth=8, colour=3),
    "a PNG with a chunk of 2 GB": lambda: TINY[:33] + struct.pack(">I", 0x7FFFFFFF) + b"IDAT" + bytes(100),
    "an ICO of 4000 images": lambda: (
        struct.pack("<HHH", 0, 1, 4000) + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 99, 64000) * 4000
    ),
    "an ICO with a PNG of 60,000 x 60,000": lambda: (
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, 99, 22) + png(60_000, 60_000, b"")
    ),
    "a GIF of many frames": lambda: (
        b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff" + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0" * 200_000 + b";"
    ),
    "a BMP of negative height": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 58, 0, 0, 54, 40, 8, -(2**31), 1, 24, 0, 4, 1, 1, 0, 0) + bytes(4)
    ),
    "a PPM of a million digits": lambda: b"P6 " + b"9" * 1_000_000 + b" 1 255\n",
    "a PPM of a long comment": lambda: b"P6 #" + b"x" * 3_000_000,
    "a TIFF whose directory is itself": lambda: b"II*\0\x08\0\0\0\1\0\x00\x01\3\0\1\0\0\0\1\0\0\0\x08\0\0\0",
    "a TIFF of 65,535 tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\x00\x01\4\0\xff\xff\xff\x7f\1\0\0\0" * 65_535,
    "a JPEG of markers alone": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 500_000,
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "text": lambda: b"hello",
    "zeros": lambda: bytes(1 << 20),
}


SOURCES: tuple[Any, ...] = (
    "", "\0", "x" * 100_000, "/etc/passwd", "/proc/self/mem", "/dev/null", "/", "~", "data:", "data:image/png;base64,",
    "data:image/png;base64,!", "data:image/svg+xml,<svg/>", "data:text/html;base64,AAAA", "data:image/png;base64,AAAA",
    "file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1", "http://", "http:///x", "http://[",
    "http://127.0.0.1:99999/", "http://127.0.0.1:x/", "http://127.0.0.1:1/", "http://\0/", "http://a b/", "://", "\ud800",
    b"bytes", 3, None, object(), [], Path("/"), Path("\0"), Path("/dev/null"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    menu: tuple[tuple[str, Make], ...]  # what, and a source
    path: Path


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    path, files = folder / "image", samples()
    for _, data in files:  # opens what Pillow keeps open
        _load(io.BytesIO(data))
    menu: list[tuple[str, Make]] = [(name, partial(_file, path, bomb)) for name, bomb in BOMBS.items()]
    menu += [(f"the source {source!r:.80}", lambda _, source=source: source) for source in SOURCES]
    for name, data in files:
        menu += [(f"{change} {name}", partial(_changed, path, CHANGES[change], data)) for change in CHANGES]
    yield Ground(tuple(shuffled(menu)), path)


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    what, source_of = ground.menu[index % len(ground.menu)]
    source = source_of(rng)
    return Attempt(what, lambda: _load(source))


def _file(path: Path, data: Callable[[], bytes], rng: random.Random) -> Any:
    return _source(rng, data(), path)


def _changed(path: Path, change: Callable[[random.Random, bytes], bytes], data: bytes, rng: random.Random) -> Any:
    return _source(rng, change(rng, data), path)


def _source(rng: random.Random, data: bytes, path: Path) -> Any:
    """The bytes as a file object, a path or a data URL."""
    match rng.randrange(4):
        case 0:
            path.write_bytes(data)
            return path
        case 1:
            return "data:image/png;base64," + base64.b64encode(data).decode()
    return io.BytesIO(data)


def _load(source: Any) -> str:
    image = load_image(source)
    return "RGB image" if isinstance(image, Image.Image) and image.mode == "RGB" and min(image.size) > 0 else "no RGB image"


KIND = Kind(
    name="images",
    what="files of 13 formats: damage, headers that lie about the size, bombs, extreme shapes, odd sources",
    endings=("ImageError", "RGB image"),
    limit_s=10,
    count=1500,
    ground=ground,
    make=make,
)
