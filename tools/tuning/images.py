"""Tokens of the prompt and tiles of the vision graph that an image takes, counted by the runtime's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ...runtime.artifact import ImageProcessorConfig, ModelInfo
from ...runtime.processor.families import llava, llava_next
from ...runtime.processor.tiles import grid_of

ROWS: dict[str, Callable[[tuple[int, int], ModelInfo], np.ndarray]] = {
    "llava": llava.image_rows,
    "llava_next": llava_next.image_rows,
    "qwen_vl": llava.image_rows,
}


class ImageCounter:
    """A counter of tokens and tiles of images in one family. `usual`: (width, height) of images without a size in the trace."""

    def __init__(self, info: ModelInfo, usual: tuple[int, int]) -> None:
        self.info, self.usual = info, usual
        self.count = lru_cache(maxsize=1 << 16)(self._count)

    def _count(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens, tiles) of an image of `size`, (width, height) in pixels."""
        return image_tokens(size, self.info), tiles(size, self.info.image)


def image_tokens(size: tuple[int, int], info: ModelInfo) -> int:
    """Positions of the prompt that stand for an image; one where images enter by cross-attention."""
    return len(ROWS[info.family](size, info)) if info.family in ROWS else 1


def tiles(size: tuple[int, int], info: ImageProcessorConfig) -> int:
    """Tiles that the vision graph encodes for an image."""
    if info.mode == "tiles":
        return info.tiles  # empty ones included
    cut = math.prod(grid_of(size, info))
    return 1 + cut if info.mode == "anyres" else 1
