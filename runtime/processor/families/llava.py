"""LLaVA-1.5: an image is one square, whose feature rows take the place of its mark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...artifact import ModelInfo
from ..boxes import parse_boxes
from ..images import ImageSource
from ..prompt import Prompt
from ..tokenizer import Tokenizer
from .fusion import fused_prompt
from .marks import chat_by, parts_of, rendered, to_text

__all__ = ["chat_prompt", "image_tokens", "parse_boxes", "parts_of", "raw_prompt", "to_text"]


def raw_prompt(text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer, *, guard: str = "") -> Prompt:
    """See Family.raw_prompt; special tokens that `guard` breaks up are words."""
    return fused_prompt(text, images, info, tokenizer, image_rows, guard)


chat_prompt = chat_by(rendered, raw_prompt)


def image_rows(size: tuple[int, int], info: ModelInfo) -> np.ndarray:
    """All rows of the image's one tile, int32 [P]."""
    return np.arange(info.image.rows, dtype=np.int32)


def image_tokens(size: tuple[int, int], info: ModelInfo) -> int:
    """See Family.image_tokens."""
    return info.image.rows
