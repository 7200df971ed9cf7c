"""Prompts and images as `generate`, `stream` and a chat take them, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from .processor.images import ImageSource
from .processor.prompt import Message, PromptError

Images = SequenceOf[ImageSource] | ImageSource | None
Turn = str | Message  # of the user


def check_text(text: Any) -> str:
    if not isinstance(text, str):
        raise PromptError(f"a prompt is {type(text).__name__}; expected text")
    return text


def as_list(images: Any) -> list[ImageSource]:
    """One image, several or none -> a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def pair_up(prompts: SequenceOf[Turn], images: Any) -> list[tuple[Turn, Any]]:
    """Each prompt with its images."""
    if not isinstance(prompts, list | tuple):
        raise PromptError(f"prompts is {type(prompts).__name__}; expected a text or a list of texts")
    if images is None:
        return [(prompt, None) for prompt in prompts]
    if not isinstance(images, list | tuple) or len(images) != len(prompts):
        count = len(images) if isinstance(images, list | tuple) else "one entry that is no list"
        raise PromptError(
            f"{len(prompts)} prompts were given but images has {count}; give a list with one entry for each prompt: an image, "
            "a list of them, or None"
        )
    return list(zip(prompts, images, strict=True))
