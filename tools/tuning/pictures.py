"""What a picture takes: tokens of the prompt, and tiles of the vision graph, counted by the runtime's own functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ...runtime.artifact import ImageFacts, ModelFacts
from ...runtime.processor.families import llava, llava_next
from ...runtime.processor.tiles import grid_of

ROWS: dict[str, Callable[[tuple[int, int], ModelFacts], np.ndarray]] = {
    "llava": llava.picture_rows,
    "llava_next": llava_next.picture_rows,
    "qwen_vl": llava.picture_rows,
}


class PictureCounter:
    """Tokens and tiles of pictures in one family; sizes that a trace does not give are taken to be `usual`."""

    def __init__(self, facts: ModelFacts, usual: tuple[int, int]) -> None:
        self.facts, self.usual = facts, usual
        self.count = lru_cache(maxsize=1 << 16)(self._count)

    def _count(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens, tiles) of a picture of `size`, (width, height) in pixels."""
        return image_tokens(size, self.facts), tiles(size, self.facts.image)


def image_tokens(size: tuple[int, int], facts: ModelFacts) -> int:
    """Positions of the prompt that stand for a picture; one where pictures enter by cross-attention."""
    return len(ROWS[facts.family](size, facts)) if facts.family in ROWS else 1


def tiles(size: tuple[int, int], facts: ImageFacts) -> int:
    """Tiles that the vision graph encodes for a picture."""
    if facts.mode == "tiles":
        return facts.tiles  # empty ones included
    cut = math.prod(grid_of(size, facts))
    return 1 + cut if facts.mode == "anyres" else 1
