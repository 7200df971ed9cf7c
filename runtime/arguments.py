"""What `generate`, `stream` and a chat are given, checked and brought into one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import Any

from .engine.request import Output, SamplingParams
from .processor.images import ImageSource
from .processor.prompt import Message, PromptError
from .sampling.params import SETTINGS
from .shown import shown

Images = SequenceOf[ImageSource] | ImageSource | None
Turn = str | Message  # of the user


def merge_params(sampling: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    """`sampling` with the settings given by name; an unknown one is an error."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"unknown settings {shown(', '.join(unknown))}; expected {', '.join(sorted(SETTINGS))}")
    return dataclasses.replace(sampling or SamplingParams(), **settings)


def one_answer(params: SamplingParams) -> SamplingParams:
    """The params of an answer that is streamed or kept in a conversation; raises ValueError where several are asked for."""
    if params.n > 1:
        raise ValueError(f"n is {params.n}; a stream or a chat's turn has one answer, so use generate for several")
    return params


def grouped(outputs: list[Output], n: int) -> list[Output]:
    """The answers to each prompt as one: the first, which has the others."""
    groups = (outputs[start : start + n] for start in range(0, len(outputs), n))
    return [dataclasses.replace(first, others=tuple(others)) for first, *others in groups]


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
