"""The grid of tiles that an image is cut into, and the size of the image on that grid.

A size is (width, height) in pixels, a grid (rows, columns) of tiles of `side` x `side` pixels. The arithmetic is that of the
reference processors, float by float: another order of operations gives other sizes.
"""

from __future__ import annotations

import math

from ..artifact import ImageProcessorConfig


def grid_of(size: tuple[int, int], config: ImageProcessorConfig) -> tuple[int, int]:
    """The grid that an image of `size` is cut into; (1, 1) in the modes that do not cut."""
    if config.mode == "anyres":
        return anyres_grid(size, config.grids, config.size)
    if config.mode == "tiles":
        return canvas_grid(size, tuple(grid for grid in config.grids if math.prod(grid) <= config.tiles), config.size)
    return 1, 1


def tile_count(size: tuple[int, int], config: ImageProcessorConfig) -> int:
    """The number of tiles that the vision graph encodes for an image of `size`, empty ones included."""
    if config.mode == "tiles":
        return config.tiles
    tiles = math.prod(grid_of(size, config))
    return 1 + tiles if config.mode == "anyres" else tiles


def anyres_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...], side: int) -> tuple[int, int]:
    """LLaVA-1.6: the grid that shows most pixels of the image; of equals the one that wastes least, then the first."""
    width, height = size

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        rows, columns = grid
        scale = min(columns * side / width, rows * side / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - rows * columns * side * side

    return max(grids, key=merit)


def anyres_size(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """LLaVA-1.6: the image as large as fits the grid, its shape kept."""
    width, height = size
    rows, columns = grid
    most_wide, most_high = columns * side, rows * side
    x_scale, y_scale = most_wide / width, most_high / height
    if x_scale < y_scale:
        return most_wide, min(math.ceil(height * x_scale), most_high)
    return min(math.ceil(width * y_scale), most_wide), most_high


def canvas_grid(size: tuple[int, int], grids: tuple[tuple[int, int], ...], side: int) -> tuple[int, int]:
    """Llama-3.2-Vision: the grid that enlarges the image least; where all shrink it, the one that shrinks it least.

    Of equals the smallest, then the first.
    """
    width, height = size

    def demerit(grid: tuple[int, int]) -> tuple[bool, float, int]:
        rows, columns = grid
        scale = min(rows * side / height, columns * side / width)
        return scale < 1, scale if scale >= 1 else -scale, rows * columns

    return min(grids, key=demerit)


def canvas_size(size: tuple[int, int], grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Llama-3.2-Vision: the image at its own size where that fits the grid, but no edge below that of a tile."""
    width, height = size
    rows, columns = grid
    wide, high = min(max(width, side), columns * side), min(max(height, side), rows * side)
    x_scale, y_scale = wide / width, high / height
    if x_scale < y_scale:
        return wide, min(math.floor(height * x_scale) or 1, high)
    return min(math.floor(width * y_scale) or 1, wide), high
