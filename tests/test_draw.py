"""Images with boxes on them, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from staticvl.runtime.processor.boxes import Box, Quad
from staticvl.tools import draw as drawing
from staticvl.tools.draw import COLOURS, FONTS, GAP, draw

BLACK = (0, 0, 0)


def box(pixels: tuple[int, int, int, int], image: int = 0, label: str | None = None, quad: Quad | None = None) -> Box:
    return Box(label=label, normalised=(0, 0, 1, 1), pixels=pixels, image=image, quad=quad)


def drawn(images: list[Image.Image], boxes: list[Box], folder: Path) -> np.ndarray:
    path = folder / "out.png"
    draw(images, boxes, path)
    return np.asarray(Image.open(path))


def black(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), BLACK)


def test_a_box_is_a_frame(tmp_path: Path) -> None:
    found = drawn([black(100, 80)], [box((10, 20, 60, 70))], tmp_path)
    assert found.shape == (80, 100, 3)
    expected = np.zeros((80, 100), dtype=bool)
    expected[20:71, 10:61] = True
    expected[22:69, 12:59] = False  # two pixels wide
    np.testing.assert_array_equal((found == COLOURS[0]).all(axis=-1), expected)
    assert (found[~expected] == 0).all()


def test_boxes_of_a_turned_file_are_where_a_person_sees_them(tmp_path: Path) -> None:
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    black(100, 80).save(path, exif=exif)
    draw([path], [box((10, 20, 60, 90))], tmp_path / "out.png")
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert found.shape == (100, 80, 3)
    rows, columns = np.nonzero((found == COLOURS[0]).all(axis=-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 60, 90)


def test_a_quad_is_a_closed_line(tmp_path: Path) -> None:
    points = ((50, 10), (90, 40), (50, 70), (10, 40))
    quad = Quad(normalised=((0.5, 0.1),) * 4, pixels=points)
    found = drawn([black(100, 80)], [box((10, 10, 90, 70), quad=quad)], tmp_path)
    for (x1, y1), (x2, y2) in zip(points, (*points[1:], points[0]), strict=True):
        assert tuple(found[(y1 + y2) // 2, (x1 + x2) // 2]) == COLOURS[0]
    assert tuple(found[10, 10]) == BLACK and tuple(found[40, 50]) == BLACK  # neither its box nor its inside


def test_every_box_is_on_its_own_image(tmp_path: Path) -> None:
    found = drawn([black(40, 30), black(50, 60)], [box((5, 5, 20, 20), 1, "b"), box((1, 1, 10, 10), 0)], tmp_path)
    assert found.shape == (60, 40 + GAP + 50, 3)
    assert (found[30:, :40] == 255).all() and (found[:, 40 : 40 + GAP] == 255).all()
    left, right = found[:30, :40], found[:, 40 + GAP :]
    assert tuple(left[10, 5]) == COLOURS[1] and not (left == COLOURS[0]).all(axis=-1).any()
    assert tuple(right[20, 12]) == COLOURS[0] and not (right == COLOURS[1]).all(axis=-1).any()


def test_labels_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def white(label: str | None, pixels: tuple[int, int, int, int] = (10, 10, 190, 190)) -> int:
        found = drawn([black(200, 200)], [box(pixels, label=label)], tmp_path)
        return int((found[..., 1] > 60).sum())  # neither black nor the colour has green in it

    assert white(None) == 0 < white("dog") < white("dog and cat")
    assert white("狗") > 0
    assert white("dog", (-50, -50, 190, 190)) == white("dog")  # a box that begins outside still shows its label
    monkeypatch.setattr(drawing, "FONTS", ("no such font.ttf",))
    assert white("dog") > 0 and white("狗") > 0  # PIL's own font


def test_a_font_with_chinese_letters_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names, default = [], ImageFont.load_default(12)

    def truetype(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        names.append(name)
        if name != FONTS[1]:
            raise OSError
        return default

    monkeypatch.setattr(drawing.ImageFont, "truetype", truetype)
    assert drawing._font(12) is default
    assert names == list(FONTS[:2])


def test_without_boxes_the_image_is_written(tmp_path: Path) -> None:
    assert (drawn([black(9, 7)], [], tmp_path) == 0).all()


def test_without_images_there_is_nothing_to_draw_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--draw was given without --image; give the image to draw on"):
        draw([], [], tmp_path / "out.png")
