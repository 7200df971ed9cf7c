"""Llama-3.2-Vision: an image is one token; its tiles and a mask go to the cross-attention layers.

Legend: L positions of the prompt, N images of t tiles each, S side of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...artifact import ModelInfo
from ..boxes import parse_boxes
from ..images import ImageSource, frame_of, load_image, stack_pixels
from ..prompt import CrossAttentionMask, Message, Prompt
from ..tiles import grid_of
from ..tokenizer import IMAGE_ID, Tokenizer
from . import marks

__all__ = ["chat_prompt", "image_tokens", "parse_boxes", "parts_of", "raw_prompt", "to_text"]

parts_of = marks.parts_of


def to_text(messages: Sequence[Message], template: str, info: ModelInfo, tokenizer: Tokenizer, **settings: Any) -> str:
    """As marks.to_text."""
    return marks.to_text(messages, template, info, tokenizer, content=_content, **settings)


def _content(message: Message, mark: str, words: Callable[[str], str]) -> marks.Content:
    """The content for the template, which leaves out its system block where there are images: inline images are parts too.

    A system message is plain text: the template writes it out as it is.
    """
    if message.role == "system" and not message.images:
        return words("\n".join(message.texts))
    return [{"type": "text", "text": words(part)} if isinstance(part, str) else {"type": "image"} for part in message.parts]


def raw_prompt(text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer, *, guard: str = "") -> Prompt:
    """The prompt of a text; BOS is put in when the text holds none.

    Raises PromptError when marks and images differ in number, ImageError, TokenizerError.
    """
    text = _with_bos(text, tokenizer.token(info.tokenizer.bos_token_id), info.image.mark)
    token_ids = np.array(tokenizer.encode(text, add_bos=False, guard=guard), dtype=np.int32)
    is_image = token_ids == info.tokenizer.image_token_id
    marks.check_ids(np.where(is_image, IMAGE_ID, token_ids), len(images), info)
    rgb_images = [load_image(image, alpha=info.image.alpha) for image in images]
    grids = np.array([grid_of(image.size, info.image) for image in rgb_images], dtype=np.int32).reshape(-1, 2)
    cross_attention = cross_attention_mask(is_image, grids.prod(axis=1), info) if images else None
    return Prompt(
        token_ids=token_ids,
        rows=np.full(token_ids.shape, -1, dtype=np.int32),
        pixels=stack_pixels(rgb_images, info.image),
        frames=tuple(frame_of(image.size, info.image) for image in rgb_images),
        image_tokens=len(rgb_images),
        grids=grids,
        cross_attention=cross_attention,
        state=_state(cross_attention, len(rgb_images), token_ids.size),
    )


def image_tokens(size: tuple[int, int], info: ModelInfo) -> int:
    """See Family.image_tokens: the image's own token, whatever its size."""
    return 1


chat_prompt = marks.chat_by(functools.partial(marks.rendered, content=_content), raw_prompt)


def _with_bos(text: str, bos: str, mark: str) -> str:
    """The text with BOS; where it had none, after the marks at its start, as transformers' MllamaProcessor does."""
    if bos in text:
        return text
    rest = text
    while rest.startswith(mark):
        rest = rest.removeprefix(mark)
    return text[: len(text) - len(rest)] + bos + rest


def cross_attention_mask(is_image: np.ndarray, tiles: np.ndarray, info: ModelInfo) -> CrossAttentionMask:
    """The tiles that each position attends to. `is_image`, bool [L]: the images' tokens; `tiles`, int [N]: their tiles in use.

    An image is seen from its own token up to the next image's; images in a row are seen together.
    """
    starts = np.flatnonzero(is_image)
    visible = np.zeros((is_image.size, starts.size, info.image.tiles), dtype=bool)
    for image, (start, end) in enumerate(zip(starts, _ends(starts, is_image.size), strict=True)):
        visible[start:end, image, : tiles[image]] = True
    visible = visible.reshape(is_image.size, -1)  # [L, N * t]
    before = ~visible.any(axis=1)
    gates = np.ones((is_image.size, 2), dtype=np.float32)
    gates[before] = 0
    if info.text_before_image == "transformers":
        # There the mask of such a row is multiplied by 0: it hides nothing, not even tiles that are not in use.
        visible[before] = True
        gates[before, 0] = 1
    return CrossAttentionMask(visible=visible, gates=gates)


def _ends(starts: np.ndarray, length: int) -> np.ndarray:
    ends = np.append(starts[1:], length)
    for image in reversed(range(starts.size - 1)):
        if ends[image] == starts[image] + 1:
            ends[image] = ends[image + 1]
    return ends


def _state(cross_attention: CrossAttentionMask | None, images: int, length: int) -> np.ndarray:
    """Prompt.state, int32 [L]: positions that attend to images after them change with every further image."""
    if cross_attention is None:
        return np.zeros(length, dtype=np.int32)
    everything = (cross_attention.gates == (1, 0)).all(axis=1)
    return np.where(everything, np.int32(images), np.int32(0))
