"""What a prompt requires of the inputs of its runs, computed here again from token ids and sizes of images alone.

The processor and the engine, which are checked by it, share no code with this module.

L positions of the prompt, N images of t tiles each, P rows of features a tile, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...runtime.artifact import ModelInfo
from ...runtime.processor.prompt import Prompt

Grid = tuple[int, int]  # rows, columns of tiles


@dataclass(frozen=True)
class ExpectedInputs:
    """The inputs that one prompt requires. Images take their sizes from its frames."""

    prompt: Prompt
    info: ModelInfo
    head_dim: int

    @cached_property
    def grids(self) -> list[Grid]:
        """The grid of tiles of each image."""
        choose = {"anyres": most_pixels, "tiles": least_scaling}.get(self.info.image.mode)
        sizes = [(frame.image_width, frame.image_height) for frame in self.prompt.frames]
        return [choose(size, self.info) if choose else (1, 1) for size in sizes]

    @cached_property
    def rows(self) -> np.ndarray | None:
        """int [L]: the row of features that each position takes, -1 for none; None where marks and images do not agree."""
        image, ids = self.info.image, self.prompt.token_ids
        required = [row for place in range(len(self.grids)) for row in self._image_rows(place)]
        token = self.info.tokenizer.image_token_id
        if self.info.image.mode == "tiles":
            return np.full(len(ids), -1)
        if token is None:  # such positions have no id of their own
            is_image = (self.prompt.rows >= 0) | (ids == (-2 if image.newline_id is None else image.newline_id))
        else:
            is_image = (ids == token) | (ids == (-2 if image.newline_id is None else image.newline_id))
        if int(is_image.sum()) != len(required):
            return None
        rows = np.full(len(ids), -1)
        rows[is_image] = required
        return rows

    def _image_rows(self, place: int) -> Iterator[int]:
        """Rows of features of one image in the order of its positions; -1 stands for a newline."""
        image = self.info.image
        before = sum(1 + r * c if image.mode == "anyres" else 1 for r, c in self.grids[:place]) * image.rows
        yield from range(before, before + image.rows)
        if image.mode != "anyres":
            return
        (rows, columns), side = self.grids[place], math.isqrt(image.rows)
        frame = self.prompt.frames[place]
        top, left = unpadded((frame.image_width, frame.image_height), (rows * side, columns * side), self.info.layout == "hf")
        for y in range(top, rows * side - top):
            for x in range(left, columns * side - left):
                tile = 1 + (y // side) * columns + x // side
                yield before + tile * image.rows + (y % side) * side + x % side
            yield -1

    @cached_property
    def tile_counts(self) -> list[int]:
        return [rows * columns for rows, columns in self.grids]

    @cached_property
    def aspect_ids(self) -> list[int]:
        """Numbers of grids from 1 on, as the tables of the vision tower have them."""
        return [1 + list(self.info.image.grids).index(grid) for grid in self.grids]

    @cached_property
    def starts(self) -> np.ndarray:
        """Positions of the images' own tokens, where images enter by cross-attention."""
        return np.flatnonzero(self.prompt.token_ids == self.info.tokenizer.image_token_id)

    @cached_property
    def visible(self) -> np.ndarray:
        """bool [L, N * t]: the tiles that each position attends to."""
        tiles = self.info.image.tiles
        visible = np.zeros((self.prompt.length, len(self.grids), tiles), bool)
        starts = [*self.starts.tolist()]
        for position in range(self.prompt.length):
            before = [image for image, start in enumerate(starts) if start <= position]
            if not before:
                visible[position] = self.info.text_before_image == "transformers"
                continue
            first = last = before[-1]
            while first > 0 and starts[first - 1] == starts[first] - 1:  # images in a row are seen together
                first -= 1
            # A position of such a row attends to the images up to its own.
            for image in range(first, last + 1):
                visible[position, image, : self.tile_counts[image]] = True
        return visible.reshape(self.prompt.length, -1)

    @cached_property
    def gates(self) -> np.ndarray:
        """float [L, 2]: factors of a cross layer's attention and MLP; both 1 from the first image on."""
        first = int(self.starts[0]) if len(self.starts) else self.prompt.length
        gates = np.ones((self.prompt.length, 2))
        gates[:first] = (1 if self.info.text_before_image == "transformers" else 0, 0)
        return gates

    def rope(self, positions: np.ndarray, ntk: float) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [n, D] of positions, in float64."""
        rope, half = self.info.rope, self.head_dim // 2
        theta = rope.theta * ntk ** (self.head_dim / (self.head_dim - 2))
        frequencies = [theta ** (-2 * i / self.head_dim) for i in range(half)]
        if scaling := rope.llama3:
            frequencies = [_llama3(f, scaling) for f in frequencies]
        angles = np.outer(positions, np.array([*frequencies, *frequencies]))
        return np.cos(angles), np.sin(angles)

    @property
    def ntk(self) -> float:
        """The factor of dynamic NTK that the length of the prompt requires."""
        trained = self.info.rope.ntk_positions
        if trained is None or self.prompt.length < 1:
            return 1.0
        return max(2.0 ** math.ceil(math.log2(self.prompt.length / trained) + 1) - 1, 1.0)

    def query_scales(self, positions: np.ndarray) -> np.ndarray:
        trained = self.info.rope.logn_positions or 1 << 62
        return np.array([math.log(p + 1, trained) if p + 1 > trained else 1.0 for p in positions.tolist()])


def _llama3(frequency: float, scaling) -> float:
    """Llama-3.1: long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_positions / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_positions / scaling.low_freq_factor:
        return frequency / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = (scaling.original_positions / wavelength - low) / (high - low)
    return (1 - share) * frequency / scaling.factor + share * frequency


def most_pixels(size: tuple[int, int], info: ModelInfo) -> Grid:
    """LLaVA-1.6: the grid that keeps most pixels of an image, then that which leaves fewest empty, then the first."""
    width, height = size
    best, best_kept, best_empty = info.image.grids[0], -1, 0
    for rows, columns in info.image.grids:
        wide, high = columns * info.image.size, rows * info.image.size
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        empty = wide * high - kept
        if kept > best_kept or (kept == best_kept and empty < best_empty):
            best, best_kept, best_empty = (rows, columns), kept, empty
    return best


def least_scaling(size: tuple[int, int], info: ModelInfo) -> Grid:
    """Llama-3.2-Vision: the least enlargement, or else the least reduction; of equals the grid of fewest tiles."""
    width, height = size
    side = info.image.size
    scales = {
        (rows, columns): min(rows * side / height, columns * side / width)
        for rows, columns in info.image.grids
        if rows * columns <= info.image.tiles
    }
    larger = [scale for scale in scales.values() if scale >= 1]
    chosen = min(larger) if larger else max(scales.values())
    equal = [grid for grid, scale in scales.items() if scale == chosen]
    return min(equal, key=lambda grid: grid[0] * grid[1])


def unpadded(size: tuple[int, int], plane: tuple[int, int], rounded: bool) -> tuple[int, int]:
    """Lines and columns of a plane (lines, columns) of patches to leave out at each side, where an image does not reach."""
    width, height = size
    lines, columns = plane
    if width / height > columns / lines:
        length = height * (columns / width)
        return (lines - int(round(length, 7) if rounded else length)) // 2, 0
    length = width * (lines / height)
    return 0, (columns - int(round(length, 7) if rounded else length)) // 2
