"""Images against transformers' PIL processors, and every way in which an image can be wrong."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from staticvl.runtime.artifact import ImageProcessorConfig
from staticvl.runtime.processor import images
from staticvl.runtime.processor.image_files import Alpha
from staticvl.runtime.processor.images import Frame, ImageError, frame_of, load_image, to_pixels

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = [(1, 1), (1, 50), (50, 1), (2, 3), (27, 29), (28, 28), (29, 27), (33, 34), (337, 335), (640, 480), (101, 67), (13, 500)]


def info(mode: str = "crop", size: int = 28, resample: int = 3) -> ImageProcessorConfig:
    return ImageProcessorConfig(mode=mode, size=size, mean=MEAN, std=STD, rows=4, resample=resample)  # type: ignore[arg-type]


def square(image: Image.Image, of: ImageProcessorConfig) -> np.ndarray:
    """The one tile of an image, uint8 [S, S, 3]."""
    pixels = to_pixels(image, of)
    assert pixels.shape == (1, of.size, of.size, 3) and pixels.dtype == np.uint8
    return pixels[0]


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def processed(image: Image.Image, mode: str, size: int, resample: int = 3) -> np.ndarray:
    """What the processor of transformers makes before rescaling, uint8 [S, S, 3]."""
    kind = LlavaImageProcessorPil if mode == "pad" else CLIPImageProcessorPil
    only_pad = {"do_pad": True} if mode == "pad" else {}
    processor = kind(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=resample, image_mean=MEAN, **only_pad
    )
    (array,) = processor(image, do_rescale=False, do_normalize=False)["pixel_values"]
    assert array.dtype == np.uint8
    return array.transpose(1, 2, 0)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_pixels_equal_the_processor(mode: str) -> None:
    rng = np.random.default_rng(1)
    sizes = SIZES + [(int(w), int(h)) for w, h in rng.integers(1, 120, (25, 2))]
    for place, (width, height) in enumerate(sizes):
        image = Image.fromarray(noise(width, height, seed=place))
        for size in (28, 31):
            pixels = square(image, info(mode, size))
            np.testing.assert_array_equal(pixels, processed(image, mode, size), err_msg=f"{width} x {height} to {size}")


def test_pixels_at_the_published_size_and_with_other_filters() -> None:
    image = Image.fromarray(noise(640, 427))
    np.testing.assert_array_equal(square(image, info("crop", 336)), processed(image, "crop", 336))
    np.testing.assert_array_equal(square(image, info("pad", 336)), processed(image, "pad", 336))
    bilinear = square(image, info("crop", 28, resample=2))
    np.testing.assert_array_equal(bilinear, processed(image, "crop", 28, resample=2))
    assert (bilinear != square(image, info("crop", 28))).any()


def test_pad_equals_the_original_expand2square() -> None:
    for width, height in ((5, 3), (4, 9), (3, 8), (7, 7)):
        array = noise(width, height)
        long = max(width, height)
        padded = np.empty((long, long, 3), dtype=np.uint8)
        padded[:] = (122, 116, 104)
        top, left = (long - height) // 2, (long - width) // 2
        padded[top : top + height, left : left + width] = array
        np.testing.assert_array_equal(square(Image.fromarray(array), info("pad", long)), padded)


def test_too_narrow_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_RESIZED_PIXELS", 10_000)
    narrow = Image.fromarray(noise(1, 300))
    with pytest.raises(ImageError, match=r"1 x 300 pixels is too narrow: scaling it needs 235200 pixels, more than 10000; cut"):
        to_pixels(narrow, info("crop"))
    with pytest.raises(ImageError, match="scaling it needs 90000 pixels"):
        to_pixels(narrow, info("pad"))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (40, 40), (31, 90)])
def test_frame_points_at_what_the_model_saw(mode: str, size: tuple[int, int]) -> None:
    """Draw a spot, find it in the square, and ask the frame where it came from."""
    width, height = size
    array = np.zeros((height, width, 3), dtype=np.uint8)
    y, x = height // 2 - 3, width // 2 + 5
    array[y - 2 : y + 3, x - 2 : x + 3] = 255
    seen = square(Image.fromarray(array), info(mode, 64))[:, :, 0].astype(float)
    if mode == "pad":
        seen[seen < 130] = 0  # the padding colour
    rows, columns = np.indices(seen.shape)
    u = float((seen * (columns + 0.5)).sum() / seen.sum()) / 64
    v = float((seen * (rows + 0.5)).sum() / seen.sum()) / 64
    found = frame_of(size, info(mode, 64)).point(u, v)
    assert found == pytest.approx((x + 0.5, y + 0.5), abs=0.35)


def test_frames_by_hand() -> None:
    assert frame_of((100, 50), info("pad")) == Frame(left=0, top=-25, width=100, height=100, image_width=100, image_height=50)
    crop = frame_of((112, 56), info("crop"))  # resized to 56 x 28, columns 14 to 42 are seen
    assert (crop.left, crop.top, crop.width, crop.height) == (28, 0, 56, 56)


def images_of_every_mode() -> list[Image.Image]:
    rgba = noise(9, 7, 4)
    palette = Image.fromarray(noise(9, 7)).quantize(8)
    palette_clear, grey_clear = palette.copy(), Image.fromarray(rgba[:, :, 0])
    palette_clear.info["transparency"] = 3
    grey_clear.info["transparency"] = int(rgba[2, 2, 0])
    return [
        Image.fromarray(rgba),
        Image.fromarray(rgba[:, :, 0]),
        Image.fromarray(rgba).convert("LA"),
        palette,
        palette_clear,
        grey_clear,
        Image.fromarray(rgba[:, :, :3]).convert("CMYK"),
        Image.fromarray(rgba[:, :, :3]).convert("YCbCr"),
        Image.fromarray(rgba[:, :, 0]).convert("1"),
    ]


def test_modes_equal_the_conversion_of_transformers() -> None:
    for image in images_of_every_mode():
        ours = square(load_image(image), info())
        np.testing.assert_array_equal(ours, processed(image, "crop", 28), err_msg=image.mode)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)


def test_dropped_alpha_shows_hidden_colours() -> None:
    for image in images_of_every_mode():
        ours = load_image(image, alpha="drop")
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(image.convert("RGB")), err_msg=image.mode)
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_image(clear, alpha="drop").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("alpha", ["white", "drop"])
def test_a_loaded_image_stays_what_it_is(alpha: Alpha) -> None:
    for image in images_of_every_mode():
        once = load_image(image, alpha=alpha)
        for again in (load_image(once, alpha="white"), load_image(once, alpha="drop")):
            np.testing.assert_array_equal(np.asarray(again), np.asarray(once), err_msg=image.mode)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(path)
    assert np.asarray(load_image(path))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_sources_give_the_same_image(tmp_path: Path) -> None:
    array = noise(6, 4)
    path = tmp_path / "a b ü.png"
    Image.fromarray(array).save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), io.BytesIO(data), url, Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), array)


def test_a_file_is_turned_and_an_object_is_not(tmp_path: Path) -> None:
    """Boxes and frames are in the turned pixels; tests/test_image_kinds.py has all containers."""
    path, array = tmp_path / "turned.png", noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    Image.fromarray(array).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.rot90(array, k=-1))
    assert load_image(Image.open(path)).size == (6, 4)
    once = load_image(path)
    assert load_image(once).size == (4, 6)
    frame = frame_of(once.size, info("pad"))
    assert (frame.image_width, frame.image_height) == (4, 6)


def test_exif_that_cannot_be_read_turns_nothing() -> None:
    file = io.BytesIO()
    Image.fromarray(noise(6, 4)).save(file, "PNG", exif=b"Exif\0\0no TIFF at all")
    with pytest.raises(SyntaxError):
        Image.open(file).getexif()
    assert load_image(file.getvalue()).size == (6, 4)


def test_the_first_frame_counts(tmp_path: Path) -> None:
    moving = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    frames[0].save(moving, save_all=True, append_images=frames[1:])
    assert load_image(moving).getpixel((1, 1)) == (255, 0, 0)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no\.png does not exist; give the path or URL of an image"):
        load_image(tmp_path / "no.png")
    for unreadable in (tmp_path, "a\0b"):
        with pytest.raises(ImageError, match="cannot be read"):
            load_image(unreadable)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png is not an image in a known format \(PNG, JPEG"):
        load_image(str(tmp_path / "text.png"))
    whole = png(noise(40, 40))
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"half\.png is damaged or cut short"):
        load_image(tmp_path / "half.png")
    (tmp_path / "head.png").write_bytes(whole[:20])
    with pytest.raises(ImageError, match=r"head\.png is (damaged|not an image)"):
        load_image(tmp_path / "head.png")
    (tmp_path / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ImageError, match="not an image in a known format"):
        load_image(tmp_path / "page.eps")
    expected = "a path, a URL, bytes, a binary file or a PIL image"
    with pytest.raises(ImageError, match=f"an image was given as int; expected {expected}"):
        load_image(3)  # type: ignore[arg-type]


def test_wrong_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(png(noise(20, 10)))
    with pytest.raises(ImageError, match=r"big\.png is 20 x 10 pixels, more than the 199 allowed; scale it down first"):
        load_image(path, max_pixels=199)
    assert load_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="the image is 0 x 3 pixels; expected at least 1 x 1"):
        load_image(Image.new("RGB", (0, 3)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL itself refuses twice its limit
    with pytest.raises(ImageError, match=r"big\.png is refused: .*decompression bomb"):
        load_image(path)


def test_wrong_data_urls() -> None:
    with pytest.raises(ImageError, match="is not an image; expected data:image/"):
        load_image("data:text/plain;base64,aGk=")
    with pytest.raises(ImageError, match="is not an image; expected data:image/"):
        load_image("data:image/png;base64")
    with pytest.raises(ImageError, match=r"data:image/png,\.\.\. is not an image in a known format"):
        load_image("data:image/png,abc")
    with pytest.raises(ImageError, match="is not valid base64"):
        load_image("data:image/png;base64,!!!!")
    with pytest.raises(ImageError, match="holds more than the 10 bytes allowed") as caught:
        load_image("data:image/png;base64," + "A" * 5000, max_bytes=10)
    assert len(str(caught.value)) < 200


IMAGE = png(noise(6, 4))


class Handler(http.server.BaseHTTPRequestHandler):
    """One path for each thing that a server can do to us."""

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            getattr(self, self.path.strip("/").split("?")[0].replace("-", "_"))()

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def good(self) -> None:
        self.head(200, Content_Length=str(len(IMAGE)))
        self.wfile.write(IMAGE)

    def missing(self) -> None:
        self.head(404)

    def page(self) -> None:
        self.head(200)
        self.wfile.write(b"<html>")

    def moved(self) -> None:
        self.head(302, Location="/good")

    def to_file(self) -> None:
        self.head(302, Location="file:///etc/hostname")

    def to_ftp(self) -> None:
        self.head(302, Location="ftp://127.0.0.1/x.png")

    def loop(self) -> None:
        self.head(302, Location="/loop")

    def announced(self) -> None:
        self.head(200, Content_Length="99999999")
        time.sleep(0.2)

    def endless(self) -> None:
        self.head(200)
        while True:
            self.wfile.write(bytes(1 << 16))

    def drip(self) -> None:
        self.head(200)
        for _ in range(100):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def drip_head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def broken(self) -> None:
        self.wfile.write(b"nonsense\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls(server: str) -> None:
    for path in ("/good", "/moved", "/good?a=1&b=ü x"):
        np.testing.assert_array_equal(np.asarray(load_image(server + path)), noise(6, 4))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", r"/missing cannot be fetched: HTTP status 404 Not Found"),
        ("/page", r"/page is not an image in a known format"),
        ("/to_file", r"/to_file redirects to file:///etc/hostname, which is not followed; expected http or https"),
        ("/to_ftp", r"/to_ftp cannot be fetched: unknown url type: ftp"),
        ("/loop", r"/loop redirects to /loop, which is not followed"),
        ("/announced", r"/announced holds more than the 100000 bytes allowed"),
        ("/endless", r"/endless holds more than the 100000 bytes allowed"),
        ("/broken", r"/broken cannot be fetched: nonsense"),
    ],
)
def test_wrong_urls(server: str, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(server + path, max_bytes=100_000, timeout_s=5)


@pytest.mark.parametrize("path", ["/drip", "/drip_head"])
def test_the_time_limit_holds_for_the_whole_download(server: str, path: str) -> None:
    start = time.monotonic()
    with pytest.raises(ImageError, match=rf"{path} did not arrive within 0\.4 s"):
        load_image(server + path, timeout_s=0.4)
    assert time.monotonic() - start < 5  # of 10


def test_a_download_that_was_given_up_ends(server: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ImageError, match="did not arrive"):
        load_image(server + "/drip", timeout_s=0.2)
    for left in set(threading.enumerate()) - before:  # perhaps none any more
        if left.name == "staticvl-download":
            left.join(timeout=10)
            assert not left.is_alive()


def test_unreachable_and_foreign_schemes() -> None:
    with pytest.raises(ImageError, match=r"x\.png cannot be fetched: .*refused"):
        load_image("http://127.0.0.1:9/x.png", timeout_s=5)
    for url, scheme in (("file:///etc/hostname", "file"), ("ftp://h/x.png", "ftp"), ("S3://bucket/x.png", "s3")):
        with pytest.raises(ImageError, match=f"has the scheme {scheme}; expected http or https, or a path"):
            load_image(url)
    with pytest.raises(ImageError, match="http:// cannot be fetched: no host given"):
        load_image("http://")
    for url in ("http://[::1/x.png", "http://\udc80/x.png", "http://127.0.0.1:port/x.png", "http://127.0.0.1:99999/x.png"):
        with pytest.raises(ImageError, match="is not a valid URL"):
            load_image(url)
