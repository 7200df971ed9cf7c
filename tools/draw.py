"""Images with the boxes of an answer on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..runtime.processor.boxes import Box
from ..runtime.processor.images import ImageSource, load_image

COLOURS = ((255, 0, 80), (0, 160, 255), (0, 190, 90), (255, 150, 0), (170, 70, 255), (0, 190, 190))  # by label
# Files that hold Chinese letters too, on Linux, macOS and Windows; PIL looks for them in the system's folders.
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc")
GAP = 8  # pixels between images


def draw(sources: Sequence[ImageSource], boxes: Sequence[Box], path: Path) -> None:
    """Write the images, side by side when there are several, each with its boxes, quads and their labels."""
    if not sources:
        raise ValueError("--draw was given without --image; give the image to draw on")
    images = [load_image(source) for source in sources]
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        _mark(images[box.image], box, COLOURS[labels.index(box.label) % len(COLOURS)])
    _side_by_side(images).save(path)


def _mark(image: Image.Image, box: Box, colour: tuple[int, int, int]) -> None:
    pen = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 150)
    if box.quad:
        pen.line([*box.quad.pixels, box.quad.pixels[0]], fill=colour, width=width, joint="curve")
    else:
        pen.rectangle(box.pixels, outline=colour, width=width)
    if box.label:
        _write(pen, box.label, (box.pixels[0], box.pixels[1]), colour, max(12, min(image.size) // 25))


def _write(pen: ImageDraw.ImageDraw, label: str, corner: tuple[int, int], colour: tuple[int, int, int], size: int) -> None:
    """White on the colour, inside the image even where the box begins outside it."""
    font, at = _font(size), (max(corner[0], 0), max(corner[1], 0))
    pen.rectangle(pen.textbbox(at, label, font=font), fill=colour)
    pen.text(at, label, fill=(255, 255, 255), font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font with Chinese letters where the system has one; PIL's own shows an empty box for letters that it lacks."""
    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width = sum(image.width + GAP for image in images) - GAP
    sheet = Image.new("RGB", (width, max(image.height for image in images)), (255, 255, 255))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet
