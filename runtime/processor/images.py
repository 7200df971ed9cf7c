"""RGB images to the tiles of the vision graph, and where these lie on the image.

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

from ..artifact import ImageProcessorConfig
from .image_files import ImageError, ImageSource, load_image
from .tiles import anyres_size, canvas_size, grid_of

__all__ = ["Frame", "ImageError", "ImageSource", "frame_of", "load_image", "stack_pixels", "to_pixels"]

MAX_RESIZED_PIXELS = 400_000_000  # of the intermediate image of to_pixels; only extreme aspect ratios come near


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The area of an image that the model's coordinates refer to, in pixels of the original image.

    A coordinate u, v in 0..1 is the point `left + u * width`, `top + v * height`. With padding the area is larger than the
    image (left or top is negative); with a centre crop it is smaller.
    """

    left: float
    top: float
    width: float
    height: float
    image_width: int
    image_height: int

    def point(self, u: float, v: float) -> tuple[float, float]:
        """Pixels of the original image, not rounded; a point in the padding lies outside the image."""
        return self.left + u * self.width, self.top + v * self.height


def to_pixels(image: Image.Image, config: ImageProcessorConfig) -> np.ndarray:
    """The tiles of an RGB image, uint8 [tiles, S, S, 3].

    crop (CLIPImageProcessor): the shortest edge becomes S, the other int(S * long / short), then the middle is cut out.
    pad (LLaVA's expand2square): a square in the colour int(255 * mean) with the image in its middle, then resized.
    stretch (Qwen-VL): resized to the square, whatever its shape.
    anyres (LLaVA-1.6): first the image stretched to one tile; then the tiles of the best grid, row by row, with the image
    in their middle on black.
    tiles (Llama-3.2-Vision): the tiles of the best grid, row by row, with the image at the top left on black; then black
    tiles up to config.tiles.

    Raises ImageError for an image so narrow that an intermediate image would not fit in memory.
    """
    if config.mode == "stretch":
        return _stretched(image, config)
    if config.mode == "anyres":
        return np.concatenate((_stretched(image, config), _anyres_tiles(image, config)))
    if config.mode == "tiles":
        return _canvas_tiles(image, config)
    return _middle(_pad_to_square(image, _pad_colour(config)) if config.mode == "pad" else image, config)


def stack_pixels(images: Sequence[Image.Image], config: ImageProcessorConfig) -> np.ndarray:
    """The tiles of all images one after the other, uint8 [tiles, S, S, 3]."""
    none = np.empty((0, config.size, config.size, 3), dtype=np.uint8)
    return np.concatenate([none, *(to_pixels(image, config) for image in images)])


def _stretched(image: Image.Image, config: ImageProcessorConfig) -> np.ndarray:
    return np.array(_resize(image, (config.size, config.size), config))[None]  # [1, S, S, 3]


def _middle(image: Image.Image, config: ImageProcessorConfig) -> np.ndarray:
    side = config.size
    width, height = _shortest_edge(image.size, side)
    _check_pixels(width * height, image.size)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array(_resize(image, (width, height), config).crop((left, top, left + side, top + side)))[None]  # [1, S, S, 3]


def _anyres_tiles(image: Image.Image, config: ImageProcessorConfig) -> np.ndarray:
    rows, columns = grid_of(image.size, config)
    width, height = anyres_size(image.size, (rows, columns), config.size)
    corner = (columns * config.size - width) // 2, (rows * config.size - height) // 2
    return _cut(_resize(image, (width, height), config), corner, (rows, columns), config.size)


def _canvas_tiles(image: Image.Image, config: ImageProcessorConfig) -> np.ndarray:
    grid = grid_of(image.size, config)
    resized = _resize(image, canvas_size(image.size, grid, config.size), config)
    tiles = np.zeros((config.tiles, config.size, config.size, 3), dtype=np.uint8)
    tiles[: math.prod(grid)] = _cut(resized, (0, 0), grid, config.size)
    return tiles


def _resize(image: Image.Image, size: tuple[int, int], config: ImageProcessorConfig) -> Image.Image:
    return image.resize(size, resample=Image.Resampling(config.resample))


def _cut(image: Image.Image, corner: tuple[int, int], grid: tuple[int, int], side: int) -> np.ndarray:
    """Tiles row by row, [rows * columns, S, S, 3], of a black canvas with the image's top left corner at `corner`."""
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


def _pad_colour(config: ImageProcessorConfig) -> tuple[int, int, int]:
    red, green, blue = config.mean
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
            f"an image of {size[0]} x {size[1]} pixels is too narrow: scaling it needs {count} pixels, more than "
            f"{MAX_RESIZED_PIXELS}; cut it into parts first"
        )


def frame_of(size: tuple[int, int], config: ImageProcessorConfig) -> Frame:
    """The frame of an image of `size`: the square that `to_pixels` makes of it; where it is stretched or cut into tiles, the
    image itself.
    """
    width, height = size
    if config.mode == "pad":
        long = max(size)
        left, top = -((long - width) // 2), -((long - height) // 2)
        return Frame(left=left, top=top, width=long, height=long, image_width=width, image_height=height)
    if config.mode != "crop":
        return Frame(left=0, top=0, width=width, height=height, image_width=width, image_height=height)
    resized_width, resized_height = _shortest_edge(size, config.size)
    x_scale, y_scale = width / resized_width, height / resized_height
    return Frame(
        left=(resized_width - config.size) // 2 * x_scale,
        top=(resized_height - config.size) // 2 * y_scale,
        width=config.size * x_scale,
        height=config.size * y_scale,
        image_width=width,
        image_height=height,
    )
