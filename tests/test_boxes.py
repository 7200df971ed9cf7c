"""Boxes in answers, by hand."""

from __future__ import annotations

import pytest

from staticvl.runtime.boxes import Box, parse_boxes, parse_corners
from staticvl.runtime.images import Frame

BUS = (0.61, 0.36, 0.92, 0.83)
WHOLE = Frame(left=0, top=0, width=200, height=100, image_width=200, image_height=100)
PADDED = Frame(left=0, top=-50, width=200, height=200, image_width=200, image_height=100)
CROPPED = Frame(left=50, top=0, width=100, height=100, image_width=200, image_height=100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.61, 0.36, 0.92, 0.83]", [BUS]),
        ("0.61, 0.36, 0.92, 0.83", [BUS]),
        ("It is at [ 0.61,0.36 , 0.92,\n0.83 ].", [BUS]),
        ("the bus 0.61, 0.36, 0.92, 0.83.", [BUS]),
        ("(0.61, 0.36, 0.92, 0.83)", [BUS]),
        ("[0.1,0.2,0.3,0.4] and [.5, .5, 1.0, 1]", [(0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.0, 1.0)]),
        ("[0, 0, 1, 1]", [(0, 0, 1, 1)]),
        ("[0.5, 0.5, 0.5, 0.5]", [(0.5, 0.5, 0.5, 0.5)]),
        ("counts: 0, 0, 1, 1", []),
        ("[0.1, 0.2, 0.3]", []),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", []),
        ("[0.1, 0.2, 0.3, 1.4]", []),
        ("[-0.1, 0.2, 0.3, 0.4]", []),
        ("[0.5, 0.2, 0.3, 0.4]", []),
        ("[0.1, 0.5, 0.3, 0.4]", []),
        ("[10, 20, 30, 40]", []),
        ("0.1%, 0.2, 0.3, 0.4%", []),
        ("0.1, 0.2, 0.3, 0.4%", []),
        ("v0.1, 0.2, 0.3, 0.4", []),
        ("", []),
        ("No box here: 3, 4.", []),
    ],
)
def test_numbers(text: str, expected: list[tuple[float, ...]]) -> None:
    assert parse_corners(text) == expected


@pytest.mark.parametrize(
    ("text", "frame", "pixels"),
    [
        ("[0.61, 0.36, 0.92, 0.83]", WHOLE, (122, 36, 184, 83)),
        ("[0.10, 0.30, 0.50, 0.60]", PADDED, (20, 10, 100, 70)),
        ("[0.00, 0.25, 1.00, 0.75]", PADDED, (0, 0, 200, 100)),
        ("[0.00, 0.245, 1.00, 0.755]", PADDED, (0, 0, 200, 100)),  # one pixel outside: rounding
        ("[0.00, 0.10, 1.00, 0.90]", PADDED, (0, -30, 200, 130)),  # in the padding: not hidden
        ("[0.25, 0.50, 1.00, 1.00]", CROPPED, (75, 50, 150, 100)),
    ],
)
def test_pixels(text: str, frame: Frame, pixels: tuple[int, ...]) -> None:
    (box,) = parse_boxes(text, [frame])
    assert box.pixels == pixels
    assert box.label is None and box.image == 0


def test_boxes_belong_to_the_first_picture() -> None:
    corners = (0.0, 0.0, 0.5, 0.5)
    text = "[0.0, 0.0, 0.5, 0.5]"
    assert parse_boxes(text, [WHOLE, PADDED]) == (Box(label=None, normalised=corners, pixels=(0, 0, 100, 50), image=0),)
    assert parse_boxes(text, []) == ()
