"""Data files: prompts, Qwen-VL's and LLaVA's conversations, and what is wrong with a file, by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from staticvl.runtime.processor.prompt import IMAGE, Message
from staticvl.tools.comparing.data import read_data
from staticvl.tools.comparing.samples import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def written(folder: Path, *records: Any, listed: bool = False) -> Path:
    path = folder / "data.json"
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if listed else "\n".join(lines) + "\n")
    return path


def test_prompts(folder: Path) -> None:
    record = {
        "id": "x",
        "prompt": "Where?",
        "images": ["a.png"],
        "answer": "Here.",
        "expected": "There.",
        "boxes": [[0, 0, 0.5, 1]],
    }
    first, second = read_data(written(folder, record, "", {"prompt": "Hi", "image": "b.png"}))
    assert first.messages == (Message("user", "Where?", 1),) and first.images == (folder / "a.png",)
    assert (first.name, first.answer, first.expected, first.boxes) == ("x", "Here.", "There.", ((0.0, 0.0, 0.5, 1.0),))
    assert second.name == "line 3" and second.images == (folder / "b.png",) and second.answer is None


@pytest.mark.parametrize("listed", [False, True])
def test_conversations_of_qwen(folder: Path, listed: bool) -> None:
    turns = [
        ("user", "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nWhich is larger?"),
        ("assistant", "The first."),
        ("user", "Why?"),
        ("assistant", "It is."),
    ]
    record = {"id": "q", "conversations": [{"from": who, "value": text} for who, text in turns]}
    first, second = read_data(written(folder, record, listed=listed))
    question = Message("user", "Which is larger?", 2)
    assert first.messages == (question,) and first.answer == "The first." and first.name == "q, turn 2"
    assert (
        second.messages == (question, Message("assistant", "The first."), Message("user", "Why?")) and second.answer == "It is."
    )
    assert first.images == second.images == (folder / "a.png", folder / "b.png")


def test_conversations_of_llava(folder: Path, tmp_path: Path) -> None:
    record = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
    }
    (sample,) = read_data(written(folder, record), folder)
    assert sample.messages == (Message("user", "What is it?", 1),) and sample.images == (folder / "a.png",)
    assert sample.answer == "A cat." and sample.name == "line 1"


def test_images_keep_their_places(folder: Path) -> None:
    """Among the texts of a turn, without the lines that end at a mark."""
    expected = Message("user", ("First:", IMAGE, "Second: ", IMAGE, "Which?"))
    for text, more in (
        ("First:\nPicture 1: <img>a.png</img>\nSecond: <img>b.png</img>Which?\n", {}),
        (" First:\n<image>\nSecond: <image>Which?", {"images": ["a.png", "b.png"]}),
    ):
        (sample,) = read_data(written(folder, turns(("user", text), ("assistant", "The first."), **more)))
        assert sample.messages == (expected,) and sample.images == (folder / "a.png", folder / "b.png")
    (sample,) = read_data(written(folder, turns(("user", "<img>a.png</img>"), ("assistant", "A cat."))))
    assert sample.messages == (Message("user", "", 1),)


def turns(*pairs: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in pairs], **more}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not JSON"),
        ("3", r"3 is no object; expected \{\"prompt\""),
        ({"question": "x"}, "neither prompt nor conversations among question"),
        ({"prompt": 3}, "prompt is 3; expected text"),
        ({"prompt": None}, "prompt is null; expected text"),
        ({"prompt": "x", "img": 1}, "unknown keys img; expected prompt, image"),
        ({"prompt": "x", "image": "c.png"}, r"c\.png is not there; paths are relative"),
        ({"prompt": "x", "image": "a.png", "images": ["b.png"]}, "both image and images are given"),
        ({"prompt": "x", "images": [3]}, "an image is 3; expected the path"),
        ({"prompt": "x", "boxes": [[0, 0, 2, 1]]}, "expected a list of"),
        ({"prompt": "x", "boxes": [[0.5, 0, 0.1, 1]]}, "x1 <= x2"),
        ({"prompt": "x", "answer": ""}, "answer is empty; leave it out"),
        ({"conversations": []}, r"conversations is \[\]; expected a list of turns"),
        ({"conversations": [{"role": "user"}]}, "turn 1 is .*; expected from and value"),
        (turns(("bot", "x")), "turn 1 is from 'bot'; expected one of user, human"),
        (turns(("user", " ")), "turn 1 is empty"),
        (turns(("assistant", "x")), "turn 1 is the assistant's after nothing; expected the user or system's"),
        (turns(("user", "x"), ("human", "y")), "turn 2 is the user's after user; expected the assistant's"),
        (turns(("user", "x")), "no turn is the assistant's"),
        (turns(("user", "<image> x"), ("gpt", "y")), "turn 1 has 1 <image> marks, but 0 images are left"),
        (turns(("user", "x"), ("gpt", "y"), image="a.png"), "1 of the images have no <image> mark"),
        (turns(("user", "<img>c.png</img>x"), ("assistant", "y")), r"c\.png is not there"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(folder: Path, record: Any, said: str) -> None:
    good = {"prompt": "fine"}
    with pytest.raises(DataError, match=rf"data\.json, line 2: .*{said}"):
        read_data(written(folder, good, record))


def test_lists_know_their_lines(folder: Path) -> None:
    with pytest.raises(DataError, match=r"line 3: neither prompt"):
        read_data(written(folder, {"prompt": "x"}, {"p": 1}, listed=True))
    with pytest.raises(DataError, match=r"line 3: not JSON"):
        read_data(written(folder, {"prompt": "x"}, "{oops}", listed=True))


def test_files_without_samples(folder: Path) -> None:
    with pytest.raises(DataError, match="holds no samples; write one JSON object a line"):
        read_data(written(folder, ""))
    (folder / "latin.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_data(folder / "latin.json")
