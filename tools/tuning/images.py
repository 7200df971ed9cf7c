"""What an image takes: tokens of the prompt, and tiles of the vision graph, counted by the runtime's own functions."""

from __future__ import annotations

from functools import lru_cache

from ...runtime.artifact import ModelInfo
from ...runtime.processor.families import family
from ...runtime.processor.tiles import tile_count


class ImageCounter:
    """Tokens and tiles of images in one family; sizes that a trace does not give are taken to be `usual`."""

    def __init__(self, info: ModelInfo, usual: tuple[int, int]) -> None:
        self.info, self.usual = info, usual
        self.count = lru_cache(maxsize=1 << 16)(self._count)

    def _count(self, size: tuple[int, int]) -> tuple[int, int]:
        """(tokens, tiles) of an image of `size`, (width, height) in pixels."""
        return family(self.info.family).image_tokens(size, self.info), tile_count(size, self.info.image)
