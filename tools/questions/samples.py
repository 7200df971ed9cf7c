"""A sample: one question with its images, and what is known of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...runtime.processor.prompt import Message

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of the image


class DataError(ValueError):
    """A data file that cannot be used; the message names file and line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question. `messages` end where the assistant answers."""

    name: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()  # paths, bytes of image files or images, in order
    answer: str | None = None  # forced on both sides of a comparison; None: the reference's own
    expected: str | None = None  # the right answer, for exact match
    boxes: tuple[Box, ...] = ()  # the right boxes, for intersection over union
    built_in: bool = False


def user_sample(name: str, text: str, images: tuple[Any, ...] = (), **more: Any) -> Sample:
    """A sample of one turn of a user, images first."""
    return Sample(name=name, messages=(Message("user", text, len(images)),), images=images, **more)
