"""What `generate`, `stream` and a chat are given, checked and brought into one form."""

from __future__ import annotations

import dataclasses
from typing import Any

from .engine.request import Output, SamplingParams
from .sampling.params import SETTINGS
from .shown import shown


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
