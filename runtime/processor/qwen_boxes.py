"""Boxes that Qwen-VL writes: <ref>what</ref><box>(x1,y1),(x2,y2)</box>, or <quad> with four points; x and y in 0..1000."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .boxes import Box, Quad, narrow
from .images import Frame

Point = tuple[int, int]

_TAG = re.compile(r"<(/?)(ref|box|quad)>")
_POINT = r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)"
_POINTS = re.compile(rf"\s*{_POINT}(?:[\s,;]*{_POINT})*\s*")
_CORNERS = {"box": 2, "quad": 4}  # points of one
# "Picture 2" is how prompts name images; answers also say "picture 2" and, in Chinese, "图2" and "图片2".
_IMAGE = re.compile(r"(?:(?<![a-z])picture|图片?) ?(\d{1,4})(?![\da-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Element:
    """A tag, its contents, and where both begin and end."""

    tag: str
    text: str
    start: int
    end: int


def parse_boxes(text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
    """Boxes and quads in an answer, in order; malformed ones are left out.

    The label of a box is the text of the <ref> before it, with nothing but other boxes and punctuation between. It belongs to
    the image that the answer named last ("Picture 2"), else to the last image, on which the original code draws.
    Several boxes may stand in one tag, and the last tag may lack its end. Wide digits and punctuation count as those of ASCII.
    Without images the result is empty. The time is linear in the length of the text.
    """
    boxes, label, end, image = [], None, 0, len(frames) - 1
    for element in _elements(text) if frames else ():
        groups = _groups(element) if element.tag != "ref" else []
        if groups is None:
            continue
        between, end = text[end : element.start], element.end
        image = _named(between, image, len(frames))
        if element.tag == "ref":
            label = element.text.strip() or None
            image = _named(element.text, image, len(frames))
            continue
        if re.search(r"\w", between):
            label = None
        boxes += [_box(points, label, image, frames[image]) for points in groups]
    return tuple(boxes)


def _elements(text: str) -> Iterator[_Element]:
    """Every tag with its text up to the closing tag, with no other tag between. The opening tag of a box or quad may be missing
    at the start of the text, since a prompt may end in it, and the closing tag at the end, where the answer was cut."""
    tag, start, begin = "text", 0, 0
    for match in _TAG.finditer(text):
        ends, name = match.groups()
        if not ends:
            tag, start, begin = name, match.start(), match.end()
            continue
        if tag == name or (tag == "text" and name != "ref"):
            yield _Element(name, text[begin : match.start()], start, match.end())
        tag = ""
    if tag in _CORNERS:
        yield _Element(tag, text[begin:], start, len(text))


def _named(text: str, image: int, count: int) -> int:
    """The image that a text names last, as an index; `image` where it names none of them."""
    numbers = [int(number) for number in _IMAGE.findall(text)]
    return next((k - 1 for k in reversed(numbers) if 1 <= k <= count), image)


def _groups(element: _Element) -> list[list[Point]] | None:
    """The points of each box or quad of a tag; None where they make none, or not all of them do."""
    content, size = narrow(element.text), _CORNERS[element.tag]
    if not _POINTS.fullmatch(content):
        return None
    points = [(int(x), int(y)) for x, y in re.findall(_POINT, content)]
    groups = [points[at : at + size] for at in range(0, len(points), size)]
    return groups if all(map(_valid, groups)) and len(points) % size == 0 else None


def _valid(points: Sequence[Point]) -> bool:
    """Whether coordinates are in 0..1000, and of two points the first is left of and above the second."""
    if any(value > 1000 for point in points for value in point):
        return False
    return len(points) != 2 or (points[0][0] <= points[1][0] and points[0][1] <= points[1][1])


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
