"""Boxes in answers, by hand: normalised lists, and the tags of Qwen-VL."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staticvl.runtime.processor import qwen_boxes as tagged_boxes
from staticvl.runtime.processor.boxes import Box, parse_boxes, parse_corners
from staticvl.runtime.processor.families import family
from staticvl.runtime.processor.images import Frame

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
        ("［0.61，0.36，0.92，0.83］", [BUS]),
        ("【0.61、0.36、0.92、0.83】", [BUS]),
        ("（０．６１，　0.36，0.92，0.83）。", [BUS]),
        ("汽车在0.61，0.36，0.92，0.83处", [BUS]),
        ("【0，0，1，1】", [(0, 0, 1, 1)]),
        ("数：0，0，1，1", []),
        ("0.1，0.2，0.3，0.4％", []),
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


def test_boxes_belong_to_the_first_image() -> None:
    corners = (0.0, 0.0, 0.5, 0.5)
    text = "[0.0, 0.0, 0.5, 0.5]"
    assert parse_boxes(text, [WHOLE, PADDED]) == (Box(label=None, normalised=corners, pixels=(0, 0, 100, 50), image=0),)
    assert parse_boxes(text, []) == ()


def test_who_writes_which_form() -> None:
    for name in ("llava", "llava_next", "mllama"):
        (box,) = family(name).parse_boxes("[0.1, 0.2, 0.3, 0.4] <box>(1,2),(3,4)</box>", [WHOLE])
        assert (box.normalised, box.thousandths, box.quad) == ((0.1, 0.2, 0.3, 0.4), None, None)
    (box,) = family("qwen_vl").parse_boxes("[0.1, 0.2, 0.3, 0.4] <box>(1,2),(3,4)</box>", [WHOLE])
    assert box.thousandths == (1, 2, 3, 4)


PHOTO = Frame(left=0, top=0, width=640, height=427, image_width=640, image_height=427)


def test_a_tagged_box() -> None:
    (box,) = tagged_boxes.parse_boxes("<ref>格子衬衫</ref><box>(588,499),(725,789)</box>", [PHOTO])
    assert box == Box(
        label="格子衬衫",
        normalised=(0.588, 0.499, 0.725, 0.789),
        pixels=(376, 213, 464, 336),  # 376.32, 213.073, 464.0, 336.903: cut off
        image=0,
        thousandths=(588, 499, 725, 789),
    )


def test_pixels_are_cut_off_for_every_coordinate() -> None:
    """int(x / 1000 * W), in floating point, whatever it rounds to."""
    for width, height in ((640, 427), (1000, 1000), (97, 61), (1, 3)):
        frame = Frame(left=0, top=0, width=width, height=height, image_width=width, image_height=height)
        for n in range(1001):
            (box,) = tagged_boxes.parse_boxes(f"<box>({n},0),(1000,{n})</box>", [frame])
            assert box.pixels == (int(n / 1000 * width), 0, width, int(n / 1000 * height))


def test_a_quad() -> None:
    text = "<ref>sign</ref><quad>(100,200),(300,100),(350,400),(90,380)</quad>"
    (box,) = tagged_boxes.parse_boxes(text, [WHOLE])
    assert (box.label, box.thousandths, box.pixels) == ("sign", (90, 100, 350, 400), (18, 10, 70, 40))
    assert box.normalised == (0.09, 0.1, 0.35, 0.4)
    assert box.quad is not None
    assert box.quad.normalised == ((0.1, 0.2), (0.3, 0.1), (0.35, 0.4), (0.09, 0.38))
    assert box.quad.pixels == ((20, 20), (60, 10), (70, 40), (18, 38))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<ref>dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", [("dogs", 1), ("dogs", 5)]),
        ("<ref>dogs</ref> <box>(1,2),(3,4)</box>, <quad>(5,6),(7,8),(9,9),(8,7)</quad>.", [("dogs", 1), ("dogs", 5)]),
        ("<box>(1,2),(3,4)</box>", [(None, 1)]),
        ("<ref>a</ref><box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box>", [("a", 1), (None, 5)]),
        ("<ref>a</ref> beside <box>(1,2),(3,4)</box>", [(None, 1)]),
        ("<ref>a</ref><ref> b </ref><box>(1,2),(3,4)</box>", [("b", 1)]),
        ("<ref>a</ref><box>(1,2),(3,4)</box>的<ref>b</ref><box>(5,6),(7,8)</box>", [("a", 1), ("b", 5)]),
        ("<ref></ref><box>(1,2),(3,4)</box>", [(None, 1)]),
        ("<box> ( 1 , 2 ) , (3,4) </box>", [(None, 1)]),
        ("(1,2),(3,4)</box> and more", [(None, 1)]),  # the prompt ended in <box>
        (" (1,2),(3,4),(5,6),(7,8)</quad>", [(None, 1)]),
        ("<box>(0,0),(1000,1000)</box>", [(None, 0)]),
        ("<box>(5,5),(5,5)</box>", [(None, 5)]),
        ("<ref>dogs</ref><box>(1,2),(3,4),(5,6),(7,8)</box>", [("dogs", 1), ("dogs", 5)]),
        ("<ref>dogs</ref><box>(1,2),(3,4)(5,6),(7,8); (9,9),(9,9)</box>", [("dogs", 1), ("dogs", 5), ("dogs", 9)]),
        ("<quad>(1,1),(9,1),(9,9),(1,9),(20,1),(29,1),(29,9),(20,9)</quad>", [(None, 1), (None, 20)]),
        ("<ref>狗</ref><box>（１，2），（3，4）</box>，<box>(5，6)、(7,8)</box>", [("狗", 1), ("狗", 5)]),
        ("<ref>a < b</ref><box>(1,2),(3,4)</box>", [("a < b", 1)]),
        ("<ref><3 </refs></ref><box>(1,2),(3,4)</box>", [("<3 </refs>", 1)]),
        ("<ref>a</ref><box>(1,2),(3,4)", [("a", 1)]),  # cut, or without the last tag
        ("<ref>a</ref><box>(1,2),(3,4)</box><quad>(5,6),(7,6),(7,8),(5,8)\n", [("a", 1), ("a", 5)]),
        ("<box>(1,2),(3,4)<box>(5,6),(7,8)</box>", [(None, 5)]),
    ],
)
def test_labels(text: str, expected: list[tuple[str | None, int]]) -> None:
    found = tagged_boxes.parse_boxes(text, [PHOTO])
    assert [(box.label, box.thousandths[0]) for box in found if box.thousandths] == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "<box>(1,2),(3,4",
        "<box>(1,2),(3,4),(5,6)",
        "<box>(1,2),(3,4),(9,8),(7,6)</box>",  # the second is none: perhaps a quad
        "<quad>(1,2),(3,4),(5,6)",
        "<ref>a</ref><box>",
        "<box>(1,2)</box>",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<box>(1,2),(3,1001)</box>",
        "<box>(1,2),(3,99999)</box>",
        "<box>(-1,2),(3,4)</box>",
        "<box>(1.5,2),(3,4)</box>",
        "<box>(3,2),(1,4)</box>",
        "<box>(1,4),(3,2)</box>",
        "<box>1,2,3,4</box>",
        "<box>(1,2),(3,4)</quad>",
        "<quad>(1,2),(3,4)</quad>",
        "<quad>(1,2),(3,4),(5,6),(7,1001)</quad>",
        "x (1,2),(3,4)</box>",
        "<ref>a<box></ref>",
        "<box><box></box>",
    ],
)
def test_malformed_boxes_are_left_out(text: str) -> None:
    assert tagged_boxes.parse_boxes(text, [PHOTO]) == ()
    good = "<ref>b</ref><box>(5,6),(7,8)</box>"
    (box,) = tagged_boxes.parse_boxes(f"{text} {good}", [PHOTO])
    assert box.label == "b"


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("<box>(0,0),(500,500)</box>", 2),  # the last image given
        ("Picture 1: <box>(0,0),(500,500)</box>", 0),
        ("In Picture 2 there is <ref>a bus</ref><box>(0,0),(500,500)</box>", 1),
        ("<ref>the bus in Picture 1</ref><box>(0,0),(500,500)</box>", 0),
        ("Picture 1 and Picture 2: <box>(0,0),(500,500)</box>", 1),
        ("Picture 1 and Picture 9: <box>(0,0),(500,500)</box>", 0),
        ("Picture 0: <box>(0,0),(500,500)</box>", 2),
        ("Picture1:<box>(0,0),(500,500)</box>", 0),
        ("picture 2:\n<box>(0,0),(500,500)</box>", 1),
        ("PICTURE 2 <box>(0,0),(500,500)</box>", 1),
        ("Picture 1: <img>a.jpg</img>\n<box>(0,0),(500,500)</box>", 0),
        ("在Picture 2中，<ref>狗</ref><box>(0,0),(500,500)</box>", 1),
        ("图1中的<ref>狗</ref><box>(0,0),(500,500)</box>", 0),
        ("<ref>图片 2 的狗</ref><box>(0,0),(500,500)</box>", 1),
        ("图１：<box>(0,0),(500,500)</box>", 0),
        ("Picture 1st <box>(0,0),(500,500)</box>", 2),
        ("Picture 12345 <box>(0,0),(500,500)</box>", 2),
        ("epicture 1 <box>(0,0),(500,500)</box>", 2),
        ("<box>(0,0),(500,500)</box> is in Picture 1", 2),
    ],
)
def test_the_image_of_a_box(text: str, image: int) -> None:
    frames = [WHOLE, PHOTO, Frame(left=0, top=0, width=10, height=10, image_width=10, image_height=10)]
    (box,) = tagged_boxes.parse_boxes(text, frames)
    assert box.image == image
    assert box.pixels == (0, 0, int(frames[image].width / 2), int(frames[image].height / 2))


def test_an_unclosed_tag_before_others_is_left_out() -> None:
    (box,) = tagged_boxes.parse_boxes("<box>(1,2),(3,4) <ref>b</ref><box>(5,6),(7,8)</box>", [PHOTO])
    assert box.label == "b"


SCRAPS = (
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "(1,2)", "(", "1", "23", ",", "，", ")", "（3，4）", " ", "\n",
    "<", "Picture", "图", "[", "]", "0.5", ".", "-", "%", "a", "的", ";", "(999,1000)", "0.1,0.2,0.3,0.4",
)  # fmt: skip
LONG = (
    "<box>", "<box>(1,2),", "(1,2),(3,4)", "<ref>", "<ref>a", "<ref>a</ref>", "<quad>(1,2)", "Picture 1", "1", "1,", "0,0,1,1 ",
    "[0,0,1,1]", "0.5,", "(1 ", "( ", "1.", " ", "<", "<box>(1,2),(3,4)</box>", "图", "[0,0,1,1", "</box>", "(1,2) x",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(SCRAPS), max_size=40) | st.text(max_size=40).map(lambda text: [text]))
def test_any_text_can_be_parsed(parts: list[str]) -> None:
    text = "".join(parts)
    for box in (*tagged_boxes.parse_boxes(text, [PHOTO, WHOLE]), *parse_boxes(text, [WHOLE])):
        assert all(0 <= n <= 1 for n in box.normalised) and box.image in (0, 1)


class Counted(str):
    """A text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key: Any) -> str:
        found = super().__getitem__(key)
        Counted.copied += len(found)
        return found


@pytest.mark.parametrize("unit", LONG)
def test_a_long_text_takes_linear_time(unit: str) -> None:
    """100,000 characters: a quadratic parser would take minutes."""
    text = Counted(unit * (100_000 // len(unit)))
    for whole in (Counted(text + "x"), Counted("<box>" + text), Counted(text + "</box>")):
        Counted.copied = 0
        tagged_boxes.parse_boxes(whole, [PHOTO])
        assert Counted.copied <= 4 * len(whole)
        parse_boxes(whole, [PHOTO])


def test_tags_without_images_mean_nothing() -> None:
    assert tagged_boxes.parse_boxes("<box>(1,2),(3,4)</box>", []) == ()
