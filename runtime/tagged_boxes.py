"""Boxes that Qwen-VL writes: <ref>what</ref><box>(x1,y1),(x2,y2)</box>, or <quad> with four points; x and y in 0..1000."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .boxes import Box, Quad
from .images import Frame

Point = tuple[int, int]

_POINT = r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)"
_TWO, _FOUR = (r"\s*,\s*".join([_POINT] * n) for n in (2, 4))
# A prompt may end in <box> or <quad>: then the answer begins with the points.
_TAG = re.compile(
    r"<ref>(?P<label>[^<]*)</ref>"
    rf"|(?:<box>|\A)\s*(?P<box>{_TWO})\s*</box>"
    rf"|(?:<quad>|\A)\s*(?P<quad>{_FOUR})\s*</quad>"
)
_PICTURE = re.compile(r"Picture (\d{1,4})\b")


def parse_boxes(text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
    """Boxes and quads in an answer, in order; what is malformed is left out.

    A box is called what the <ref> before it says, with nothing but other boxes and punctuation between. It belongs to the
    picture that the answer named last ("Picture 2"), else to the last picture given, on which the original code draws.
    Without pictures the result is empty.
    """
    found, label, end, image = [], None, 0, len(frames) - 1
    for match in _TAG.finditer(text) if frames else ():
        between, end = text[end : match.start()], match.end()
        image = _named(between, image, len(frames))
        if match["label"] is not None:
            label = match["label"].strip() or None
            image = _named(match["label"], image, len(frames))
            continue
        if re.search(r"\w", between):
            label = None
        points = _points(match["box"] or match["quad"])
        if points is not None:
            found.append(_box(points, label, image, frames[image]))
    return tuple(found)


def _named(text: str, image: int, count: int) -> int:
    """The picture that a text names last, as an index; `image` where it names none of them."""
    numbers = [int(number) for number in _PICTURE.findall(text)]
    return next((k - 1 for k in reversed(numbers) if 1 <= k <= count), image)


def _points(text: str) -> list[Point] | None:
    """The points of a box or quad; None where they make none."""
    points = [(int(x), int(y)) for x, y in re.findall(_POINT, text)]
    if any(value > 1000 for point in points for value in point):
        return None
    if len(points) == 2 and (points[0][0] > points[1][0] or points[0][1] > points[1][1]):
        return None
    return points


def _box(points: Sequence[Point], label: str | None, image: int, frame: Frame) -> Box:
    xs, ys = zip(*points, strict=True)
    corners = min(xs), min(ys), max(xs), max(ys)
    x1, y1, x2, y2 = corners
    return Box(
        label=label,
        normalised=(x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000),
        pixels=(*_pixel((x1, y1), frame), *_pixel((x2, y2), frame)),
        image=image,
        thousandths=corners,
        quad=_quad(points, frame) if len(points) == 4 else None,
    )


def _quad(points: Sequence[Point], frame: Frame) -> Quad:
    return Quad(
        normalised=tuple((x / 1000, y / 1000) for x, y in points), pixels=tuple(_pixel(point, frame) for point in points)
    )


def _pixel(point: Point, frame: Frame) -> tuple[int, int]:
    """Cut off, not rounded, as the original code does."""
    x, y = frame.point(point[0] / 1000, point[1] / 1000)
    return int(x), int(y)
