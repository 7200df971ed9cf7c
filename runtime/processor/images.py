"""Pictures as the vision graph takes them, and where its tiles lie on the picture.

Legend: S side of a tile; sizes are (width, height); coordinates are (x, y) with the origin at the top left corner.
Rescaling and normalisation happen in the graph, so everything here stays uint8. All pixels equal those of the reference
processors to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..artifact import ImageFacts
from .image_files import ImageError, ImageSource, load_image
from .tiles import anyres_size, canvas_size, grid_of

__all__ = ["Frame", "ImageError", "ImageSource", "frame_of", "load_image", "stack_pixels", "to_pixels"]

MAX_RESIZED_PIXELS = 400_000_000  # of the intermediate picture of to_pixels; only extreme aspect ratios come near


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where the area that the model's coordinates refer to lies on the original picture, in pixels of the picture.

    A coordinate u, v in 0..1 is the point `left + u * width`, `top + v * height`. With padding the area is larger than the
    picture (left or top is negative); with a centre crop it is smaller.
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


def to_pixels(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    """The tiles of an RGB picture, uint8 [tiles, S, S, 3].

    crop (CLIPImageProcessor): the shortest edge becomes S, the other int(S * long / short), then the middle is cut out.
    pad (LLaVA's expand2square): a square in the colour int(255 * mean) with the picture in its middle, then resized.
    stretch (Qwen-VL): resized to the square, whatever its shape.
    anyres (LLaVA-1.6): first the picture stretched to one tile; then the tiles of the best grid, row by row, with the picture
    in their middle on black.
    tiles (Llama-3.2-Vision): the tiles of the best grid, row by row, with the picture at the top left on black; then black
    tiles up to facts.tiles.

    Raises ImageError for a picture so narrow that an intermediate picture would not fit in memory.
    """
    if facts.mode == "stretch":
        return _stretched(image, facts)
    if facts.mode == "anyres":
        return np.concatenate((_stretched(image, facts), _anyres_tiles(image, facts)))
    if facts.mode == "tiles":
        return _canvas_tiles(image, facts)
    return _middle(_pad_to_square(image, _pad_colour(facts)) if facts.mode == "pad" else image, facts)


def stack_pixels(images: Sequence[Image.Image], facts: ImageFacts) -> np.ndarray:
    """The tiles of all pictures one after the other, uint8 [tiles, S, S, 3]."""
    none = np.empty((0, facts.size, facts.size, 3), dtype=np.uint8)
    return np.concatenate([none, *(to_pixels(image, facts) for image in images)])


def _stretched(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    return np.array(_resize(image, (facts.size, facts.size), facts))[None]  # [1, S, S, 3]


def _middle(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    side = facts.size
    width, height = _shortest_edge(image.size, side)
    _check_pixels(width * height, image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(_resize(image, (width, height), facts).crop((left, top, left + side, top + side)))[None]  # [1, S, S, 3]


def _anyres_tiles(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    rows, columns = grid_of(image.size, facts)
    width, height = anyres_size(image.size, (rows, columns), facts.size)
    corner = (columns * facts.size - width) // 2, (rows * facts.size - height) // 2
    return _cut(_resize(image, (width, height), facts), corner, (rows, columns), facts.size)


def _canvas_tiles(image: Image.Image, facts: ImageFacts) -> np.ndarray:
    grid = grid_of(image.size, facts)
    resized = _resize(image, canvas_size(image.size, grid, facts.size), facts)
    tiles = np.zeros((facts.tiles, facts.size, facts.size, 3), dtype=np.uint8)
    tiles[: math.prod(grid)] = _cut(resized, (0, 0), grid, facts.size)
    return tiles


def _resize(image: Image.Image, size: tuple[int, int], facts: ImageFacts) -> Image.Image:
    return image.resize(size, resample=Image.Resampling(facts.resample))


def _cut(image: Image.Image, corner: tuple[int, int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Tiles row by row, [rows * columns, S, S, 3], of a black canvas with the picture's top left corner at `corner`."""
    rows, columns = grid
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(image, corner)
    tiles = np.asarray(canvas).reshape(rows, side, columns, side, 3)
    return tiles.transpose(0, 2, 1, 3, 4).reshape(rows * columns, side, side, 3)


def _shortest_edge(size: tuple[int, int], side: int) -> tuple[int, int]:
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
    """Where the square that `to_pixels` makes of a picture of `size` lies on it; where it is stretched or cut into tiles,
    coordinates refer to the picture itself.
    """
    width, height = size
    if facts.mode == "pad":
        long = max(size)
        left, top = -((long - width) // 2), -((long - height) // 2)
        return Frame(left=left, top=top, width=long, height=long, image_width=width, image_height=height)
    if facts.mode != "crop":
        return Frame(left=0, top=0, width=width, height=height, image_width=width, image_height=height)
    resized_width, resized_height = _shortest_edge(size, facts.size)
    x_scale, y_scale = width / resized_width, height / resized_height
    return Frame(
        left=(resized_width - facts.size) // 2 * x_scale,
        top=(resized_height - facts.size) // 2 * y_scale,
        width=facts.size * x_scale,
        height=facts.size * y_scale,
        image_width=width,
        image_height=height,
    )
