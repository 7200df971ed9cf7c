"""Images that cannot be used: refused with one sentence, before they cost anything, and without the image in it."""

from __future__ import annotations

import base64
import io
import random
import struct
import subprocess
import sys
import textwrap
import threading
import urllib.parse
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from staticvl.runtime.processor.image_files import ImageError, ImageSource, load_image
from staticvl.runtime.processor.pillow_quiet import quiet_pillow

from .image_kinds import all_kinds, colours, written

PNG = written(colours(), "PNG")
CODED = base64.b64encode(PNG).decode()


def refusal(source: ImageSource, **limits: int) -> str:
    with pytest.raises(ImageError) as raised:
        load_image(source, **limits)  # type: ignore[arg-type]
    said = str(raised.value)
    assert len(said) < 600 and "\n" not in said and said.isprintable(), said
    return said


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(width: int, height: int) -> bytes:
    """A PNG of 8-bit grey with next to no data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 8)) + chunk(b"IEND", b"")


def icon(image: bytes) -> bytes:
    """An ICO whose head says 16 x 16, whatever is in it."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 22) + image


def bitmap_head(width: int, height: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 24, 0, 0, 0, 0, 0, 0)


# ---- limits


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding fails the test."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded before the limits were checked"))


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "in an icon"])
@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((1, 40_000_000), "1 x 40000000 pixels; expected sides of at most 65535, and at most 1000 times as long"),
        ((40_000_000, 1), "40000000 x 1 pixels; expected sides of at most 65535"),
        ((60, 60_001), "60 x 60001 pixels; expected sides of at most 65535, and at most 1000 times as long as each other"),
        ((12_000, 9_000), "12000 x 9000 pixels, more than the 100000000 allowed; scale it down first"),
    ],
)
def test_sizes_are_checked_before_anything_is_decoded(size: tuple[int, int], said: str, wrapped: bool) -> None:
    data = png_head(*size)
    assert said in refusal(icon(data) if wrapped else data)
    if wrapped:
        assert said in refusal(icon(bitmap_head(*size)))


def test_limits_are_what_they_say() -> None:
    strip = Image.new("RGB", (1000, 1))
    assert load_image(strip).size == load_image(written(strip, "PNG")).size == (1000, 1)
    assert "at most 1000 times" in refusal(Image.new("RGB", (1001, 1)))
    assert load_image(written(colours(), "PNG"), max_side=45, max_ratio=2).size == (45, 31)
    assert "sides of at most 44" in refusal(PNG, max_side=44)
    assert "at most 1 times" in refusal(PNG, max_ratio=1)


def test_pillows_own_limit_is_left_alone() -> None:
    """It belongs to the process: others may open images with it."""
    before = Image.MAX_IMAGE_PIXELS
    load_image(PNG)
    assert before == Image.MAX_IMAGE_PIXELS


# ---- values


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.float32([[0, 1000]]), "values from 0 to 1000; expected 0 to 1, or 0 to 255"),
        (np.float32([[-0.5, 0.5]]), "values from -0.5 to 0.5; expected 0 to 1, or 0 to 255"),
        (np.float32([[0, np.nan]]), "values from nan to nan; expected 0 to 1, or 0 to 255"),
        (np.float32([[0, np.inf]]), "values from 0 to inf; expected 0 to 1, or 0 to 255"),
        (np.int32([[-1, 300]]), "values from -1 to 300; expected 0 to 255, 0 to 65535, or up to the largest of its 32 bits"),
        (np.int32([[0, 70_000]]), "values from 0 to 70000; expected 0 to 255, 0 to 65535, or up to"),
    ],
)
def test_values_outside_of_every_range(values: np.ndarray, said: str) -> None:
    image = Image.fromarray(values)
    assert said in refusal(image)
    assert said in refusal(written(image, "TIFF"))


def test_a_clear_grey_of_16_bits() -> None:
    values = np.uint16([[0, 30_000], [40_000, 65_535]])
    data = written(Image.fromarray(values), "PNG", transparency=40_000)
    assert np.asarray(load_image(data))[:, :, 0].tolist() == [[0, 117], [255, 255]]
    assert np.asarray(load_image(data, alpha="drop"))[:, :, 0].tolist() == [[0, 117], [156, 255]]


# ---- damage


@pytest.mark.parametrize("kind", all_kinds()[7::8] + [k for k in all_kinds() if "AVIF" in k.name], ids=lambda kind: kind.name)
def test_damage_of_any_kind_is_an_image_error(kind: object, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the decoder raises, and without a word from it; what still opens is as good as any image."""
    data, rng = kind.data, random.Random(kind.name)  # type: ignore[attr-defined]
    damaged = [data[: rng.randrange(len(data))] for _ in range(8)]
    for _ in range(16):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4, 40))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        damaged.append(bytes(changed))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for each in damaged:
            try:
                assert load_image(each, max_pixels=1_000_000).mode == "RGB"
            except ImageError as error:
                assert str(error).startswith("the image is ") or "has values" in str(error)
    assert not [str(each.message) for each in seen]
    assert capfd.readouterr() == ("", "")


def test_whatever_a_decoder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, said in (
        (RuntimeError("Failed to decode frame"), "damaged or cut short (Failed to decode frame)"),
        (AssertionError(), "damaged or cut short (AssertionError)"),
        (OverflowError("x" * 9999), "damaged or cut short (xxx"),
        (MemoryError(), "45 x 31 pixels, which do not fit in memory"),
    ):

        def fail(_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", fail)
            assert said in refusal(PNG)


def test_warnings_of_others_stay() -> None:
    """Two threads that load at once leave the filters as they were."""
    before, inside, leave = list(warnings.filters), threading.Event(), threading.Event()

    def other() -> None:
        with quiet_pillow:
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with quiet_pillow:
        thread.start()
        assert inside.wait(20)
        with pytest.warns(UserWarning, match="ours"):
            warnings.warn("ours", UserWarning, stacklevel=1)
    assert list(warnings.filters) != before
    leave.set()
    thread.join(20)
    assert list(warnings.filters) == before


# ---- text

BROKEN = "\r\n".join(textwrap.wrap(CODED, 76))


@pytest.mark.parametrize(
    "source",
    [
        PNG,
        bytearray(PNG),
        CODED,
        BROKEN,
        f"data:image/png;base64,{BROKEN}",
        f"DATA:image/PNG;BASE64,{CODED}",
        f"data:image/png;charset=utf-8;base64,{CODED}",
        f"data:application/octet-stream;base64,{CODED}",
        f"data:;base64,{CODED}",
        f"data:image/png;base64, {CODED.rstrip('=')}\n",
        f"data:image/png;base64,{urllib.parse.quote(CODED, safe='')}",
        f"data:image/png,{urllib.parse.quote(PNG)}",
        f"data:,{urllib.parse.quote(PNG)}",
    ],
    ids=lambda source: str(source[:40]),
)
def test_an_image_as_text_or_bytes(source: ImageSource) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(colours()))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "an image was given as an empty text; expected the path or URL of an image"),
        (b"", "the image is not an image in a known format"),
        ("cat", "cat does not exist; give the path or URL of an image"),
        ("AAAA" * 90, "cannot be read (File name too long)"),
        (CODED[:-4] + "!" + CODED[-4:], "the base64 text is not valid base64"),
        (f"data:text/plain;base64,{CODED}", "data:text/plain;base64,... is not an image; expected data:image/"),
        (f"data:image/png;base64,{CODED}!", "data:image/png;base64,... is not valid base64"),
        (f"data:image/png;base64,{CODED[:-7]}", "data:image/png;base64,..."),
    ],
    ids=lambda part: str(part[:40]),
)
def test_text_that_is_no_image(source: ImageSource, said: str) -> None:
    assert said in refusal(source)


@pytest.mark.parametrize(
    "text", ["a" * 5_000_000, "/9j/" + "A" * 5_000_000, "http://h/" + "a" * 70_000 + ":x", "x" * 300 + "://y"]
)
def test_a_message_never_repeats_a_long_text(text: str) -> None:
    assert len(refusal(text)) < 500
    assert len(refusal(f"data:image/{text};base64,{CODED}!")) < 500
    assert len(refusal(f"data:image/png;base64,{text}!")) < 500
    assert len(refusal(Path(text))) < 500
    file = io.BytesIO(b"nothing")
    file.name = text  # type: ignore[attr-defined]
    assert len(refusal(file)) < 500


def test_text_has_a_limit_too() -> None:
    for source in (CODED, f"data:image/png;base64,{CODED}", f"data:image/png,{urllib.parse.quote(PNG)}"):
        assert f"more than the {len(PNG) - 1} bytes allowed" in refusal(source, max_bytes=len(PNG) - 1)
        assert load_image(source, max_bytes=len(PNG)).size == (45, 31)


# ---- memory

MEASURED = """
import sys
import psutil
from staticvl.runtime.processor.image_files import load_image
small, large = sys.argv[1:]
load_image(small)
before = psutil.Process().memory_info().rss
for _ in range(3):  # glibc learns from the first to keep such blocks
    image = None
    image = load_image(large)
print((psutil.Process().memory_info().rss - before) >> 20, 4 * image.width * image.height >> 20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_of_a_large_image_is_given_back(tmp_path: Path) -> None:
    """But for the image that was made: 4 bytes a pixel in Pillow. Decoding holds two of them."""
    small, large = tmp_path / "small.png", tmp_path / "large.jpg"
    small.write_bytes(PNG)
    Image.effect_noise((600, 500), 60).resize((6000, 5000)).convert("CMYK").save(large, quality=30)
    arguments = [sys.executable, "-c", MEASURED, str(small), str(large)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    more, image = map(int, done.stdout.split())
    assert more < image + 40, done.stdout
