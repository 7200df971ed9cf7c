"""LLaVA-1.5: every picture is one square whose feature rows take the place of its mark.

Legend: L positions of the prompt, S side of the square, P rows of features per picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..artifact import ModelFacts
from ..boxes import parse_boxes
from ..chat_template import render
from ..images import ImageSource, frame_of, load_image, to_pixels
from ..prompt import Message, Prompt, PromptError
from ..tokenizer import PICTURE, Tokenizer

__all__ = ["parse_boxes", "prepare", "to_text"]


def to_text(
    messages: Sequence[Message], template: str, facts: ModelFacts, tokenizer: Tokenizer, *, add_generation_prompt: bool = True
) -> str:
    """The prompt text of a chat: pictures come first in their turn unless its text says where they stand."""
    return render(
        template,
        [{"role": message.role, "content": _content(message, facts.image.mark)} for message in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.token(facts.tokenizer.bos_token_id),
        eos_token=tokenizer.token(facts.eos_token_ids[0]),
    )


def _content(message: Message, mark: str) -> list[dict[str, Any]]:
    images = 0 if mark in message.text else message.images
    return [{"type": "image"}] * images + [{"type": "text", "text": message.text}]


def prepare(text: str, images: Sequence[ImageSource], facts: ModelFacts, tokenizer: Tokenizer) -> Prompt:
    """Ids, feature rows and pixels of a prompt: the i-th mark stands for the P rows of the i-th picture.

    Raises PromptError when marks and pictures differ in number, ImageError, TokenizerError.
    """
    ids = np.array(tokenizer.encode_with_images(text, facts.image.mark), dtype=np.int32)
    _check(ids, len(images), facts)
    loaded = [load_image(image) for image in images]
    token_ids, rows = _expand(ids, facts.image.rows, facts.tokenizer.image_token_id or 0)
    side = facts.image.size
    pixels = np.zeros((len(loaded), side, side, 3), dtype=np.uint8)
    for place, image in enumerate(loaded):
        pixels[place] = to_pixels(image, facts.image)
    return Prompt(
        token_ids=token_ids, rows=rows, pixels=pixels, frames=tuple(frame_of(image.size, facts.image) for image in loaded)
    )


def _expand(ids: np.ndarray, rows_per_image: int, image_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and feature rows, both int32 [L], with every mark repeated once per row of its picture."""
    repeats = np.where(ids == PICTURE, rows_per_image, 1)
    wide = np.repeat(ids, repeats)  # [L]
    shown = wide == PICTURE
    rows = np.full(wide.shape, -1, dtype=np.int32)
    rows[shown] = np.arange(np.count_nonzero(shown), dtype=np.int32)
    return np.where(shown, np.int32(image_token_id), wide).astype(np.int32), rows


def _check(ids: np.ndarray, images: int, facts: ModelFacts) -> None:
    marks = int(np.count_nonzero(ids == PICTURE))
    if marks != images:
        raise PromptError(
            f"the prompt has {_count(marks, facts.image.mark + ' mark')} but {_count(images, 'image')} "
            f"{'was' if images == 1 else 'were'} given; write {facts.image.mark} once for each image, or leave all marks out"
        )
    if not ids.size:
        raise PromptError("the prompt is empty; expected some text or an image")
    if ids.max() >= facts.vocab_size:
        raise PromptError(
            f"the prompt holds token {ids.max()} but the model knows {facts.vocab_size} tokens; "
            "take the special token that the tokenizer adds out of the text"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
