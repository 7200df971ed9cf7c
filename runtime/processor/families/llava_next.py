"""LLaVA-1.6: an image is a small view of its whole and a grid of tiles, both rows of features in place of its mark.

Legend: P rows of features per tile, n * n = P; r x c tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...artifact import ModelInfo
from ..boxes import parse_boxes
from ..images import ImageSource
from ..prompt import Prompt
from ..tiles import grid_of
from ..tokenizer import Tokenizer
from .fusion import fused_prompt
from .marks import chat_by, parts_of, rendered, to_text

__all__ = ["chat_prompt", "image_tokens", "parse_boxes", "parts_of", "raw_prompt", "to_text"]


def raw_prompt(text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer, *, guard: str = "") -> Prompt:
    """See Family.raw_prompt; special tokens that `guard` breaks up are words."""
    return fused_prompt(text, images, info, tokenizer, image_rows, guard)


chat_prompt = chat_by(rendered, raw_prompt)


def image_rows(size: tuple[int, int], info: ModelInfo) -> np.ndarray:
    """The P rows of the whole; then the patches of the tiles, line by line over all of them, each line ended by -1.

    Lines and columns of patches that show nothing but the black border are left out.
    """
    grid = grid_of(size, info.image)
    patches = _patches(grid, info.image.rows)
    lines, columns = _visible(size, (patches.shape[1], patches.shape[0]), rounded=info.layout == "hf")
    with_newlines = np.pad(patches[lines, columns], ((0, 0), (0, 1)), constant_values=-1)
    return np.concatenate((np.arange(info.image.rows, dtype=np.int32), with_newlines.ravel()))


def image_tokens(size: tuple[int, int], info: ModelInfo) -> int:
    """See Family.image_tokens."""
    return len(image_rows(size, info))


def _patches(grid: tuple[int, int], rows: int) -> np.ndarray:
    """The feature row of every patch where it lies on the grid, int32 [r * n, c * n]; the first tile is the whole image."""
    r, c = grid
    n = math.isqrt(rows)
    tiles = np.arange(rows, rows * (1 + r * c), dtype=np.int32).reshape(r, c, n, n)
    return tiles.transpose(0, 2, 1, 3).reshape(r * n, c * n)


def _visible(size: tuple[int, int], plane: tuple[int, int], *, rounded: bool) -> tuple[slice, slice]:
    """Lines and columns of a plane of patches, (columns, lines) in number, that an image of `size` covers.

    transformers rounds to 7 digits before it cuts off the fraction, the original code does not.
    """
    width, height = size
    wide, high = plane
    if width / height > wide / high:
        return _middle(height * (wide / width), high, rounded), slice(None)
    return slice(None), _middle(width * (high / height), wide, rounded)


def _middle(length: float, whole: int, rounded: bool) -> slice:
    margin = (whole - int(round(length, 7) if rounded else length)) // 2
    return slice(margin, whole - margin)
