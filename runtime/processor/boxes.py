"""Boxes in an answer, as coordinates of the original image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .images import Frame

Corners = tuple[float, float, float, float]  # x1, y1, x2, y2

# Models that write Chinese mix in the wide forms of digits and punctuation: one character each, so that places stay.
_NARROW = str.maketrans("０１２３４５６７８９，、．；％［］【】（）\u3000", "0123456789,,.;%[][]() ")

_NUMBER = r"[-+]?(?:\d+\.\d*|\.\d+|\d+)"
# As many comma-separated numbers as stand together, with or without brackets.
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*,\s*{_NUMBER})*(?!\w|\.\d|%)", re.ASCII)
# Models write two decimals: a coordinate may miss the edge of the image by this share of the square.
ROUNDING = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Quad:
    """A quadrilateral around an object: four points, in the order in which the model wrote them."""

    normalised: tuple[tuple[float, float], ...]  # x, y in 0..1
    pixels: tuple[tuple[int, int], ...]  # of the original image


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle in an answer: its label, its corners, and its image."""

    label: str | None  # the label that the model gave, if any
    normalised: Corners  # x1, y1, x2, y2 in 0..1 of the square that the model saw
    pixels: tuple[int, int, int, int]  # the same in pixels of the original image; in padding it may lie outside
    image: int  # index of the image
    thousandths: tuple[int, int, int, int] | None = None  # x1, y1, x2, y2 in 0..1000, where the model wrote them so (Qwen-VL)
    quad: Quad | None = None  # the points, where the model wrote four: the box is what encloses them


def narrow(text: str) -> str:
    """A text of the same length with ASCII digits and punctuation in place of wide ones."""
    return text.translate(_NARROW)


def parse_corners(text: str) -> list[Corners]:
    """Normalised boxes in a text, in order: "[0.61, 0.36, 0.92, 0.83]" or the same without brackets.

    A list counts when it has exactly four numbers in 0..1 with x1 <= x2 and y1 <= y2, written in brackets or with decimals
    ("0, 1, 1, 1" in running text is no box). Wide digits, commas and brackets count as those of ASCII.
    """
    text, boxes = narrow(text), []
    for match in _NUMBERS.finditer(text):
        words = match[0].split(",")
        numbers = [float(word) for word in words]
        if len(numbers) != 4 or not all(0 <= n <= 1 for n in numbers):
            continue
        x1, y1, x2, y2 = numbers
        if x1 <= x2 and y1 <= y2 and ("." in match[0] or _in_brackets(text, match)):
            boxes.append((x1, y1, x2, y2))
    return boxes


def _in_brackets(text: str, match: re.Match[str]) -> bool:
    before, after = match.start() - 1, match.end()
    while before >= 0 and text[before].isspace():
        before -= 1
    while after < len(text) and text[after].isspace():
        after += 1
    return before >= 0 and text[before] == "[" and text[after : after + 1] == "]"


def place(corners: Corners, frame: Frame) -> tuple[int, int, int, int]:
    """Pixels x1, y1, x2, y2 of the original image, rounded. A coordinate that misses the edge by rounding alone lies on it."""
    (x1, y1), (x2, y2) = frame.point(*corners[:2]), frame.point(*corners[2:])
    return (
        _to_edge(x1, frame.image_width, frame.width),
        _to_edge(y1, frame.image_height, frame.height),
        _to_edge(x2, frame.image_width, frame.width),
        _to_edge(y2, frame.image_height, frame.height),
    )


def _to_edge(value: float, limit: int, span: float) -> int:
    slack = ROUNDING * span + 0.5
    if -slack <= value < 0:
        return 0
    return limit if limit < value <= limit + slack else round(value)


def parse_boxes(text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
    """Boxes in an answer. Their coordinates name no image, so that all are boxes of the first one.

    Without images the result is empty.
    """
    if not frames:
        return ()
    return tuple(
        Box(label=None, normalised=corners, pixels=place(corners, frames[0]), image=0) for corners in parse_corners(text)
    )
