"""Data files: prompts, Qwen-VL's and LLaVA's conversations, and what is wrong with a file, by line."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from staticvl.runtime.processor.prompt import IMAGE, Message
from staticvl.tools.comparing.samples import DataError
from staticvl.tools.questions.read import read_data


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


# --- formats of others -------------------------------------------------------------------------------------------------


def test_messages_of_an_api_and_of_llama_factory(folder: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    question = {"role": "user", "content": [{"type": "text", "text": "First:"}, image, {"type": "text", "text": "What?"}]}
    conversation = {"messages": [question, {"role": "assistant", "content": "A."}, {"role": "user", "content": "Why?"}]}
    marked = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}],
        "images": ["b.png"],
    }
    batch = {
        "custom_id": "r1",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    }
    first, open_end, second, third = read_data(written(folder, conversation, marked, batch))
    message = Message("user", ("First:", IMAGE, "What?"))
    assert (first.messages, first.images, first.answer) == ((message,), (folder / "a.png",), "A.")
    assert (open_end.messages[-1], open_end.answer) == (Message("user", "Why?"), None)
    assert (second.messages, second.images, second.answer) == ((Message("user", "What?", 1),), (folder / "b.png",), "A.")
    assert (third.name, third.messages, third.answer) == ("r1", (Message("user", "Hi"),), None)


def test_a_mark_without_images_is_words(folder: Path) -> None:
    record = {"messages": [{"role": "user", "content": "What does <image> do?"}]}
    (sample,) = read_data(written(folder, record))
    assert sample.messages == (Message("user", "What does <image> do?"),) and sample.images == ()


def test_images_in_data_urls(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"pixels").decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    (sample,) = read_data(written(folder, {"messages": [{"role": "user", "content": content}]}))
    assert sample.images == (b"pixels",)


def test_a_table_of_vlmevalkit(folder: Path) -> None:
    path = folder / "table.tsv"
    image = base64.b64encode(b"pixels").decode()
    header = "index\timage\timage_path\tquestion\thint\tA\tB\tanswer\n"
    path.write_text(f'{header}7\t{image}\t\t"Which, ""red""?"\tLook.\tred\tblue\tA\n8\t\ta.png\tWhat?\t\t\t\tA cat\n')
    choice, free = read_data(path)
    question = 'Hint: Look.\nQuestion: Which, "red"?\nOptions:\nA. red\nB. blue\n'
    message = Message("user", question + "Please select the correct answer from the options above.", 1)
    assert (choice.name, choice.messages, choice.images, choice.expected) == ("7", (message,), (b"pixels",), "A")
    assert (free.messages, free.images, free.expected) == ((Message("user", "What?", 1),), (folder / "a.png",), "A cat")


def test_logs_of_lmms_eval_and_questions_of_llava_bench(folder: Path) -> None:
    logged = {
        "doc_id": 3,
        "doc": {"question": "Q?", "image": "a.png"},
        "target": "A",
        "input": "Q?\nOne word.",
        "resps": [["a"]],
    }
    bench_line = {"question_id": 0, "image": "b.png", "text": "Describe.", "category": "detail"}
    first, second = read_data(written(folder, logged, bench_line))
    assert (first.name, first.messages, first.expected) == ("3", (Message("user", "Q?\nOne word.", 1),), "A")
    assert (second.name, second.messages, second.expected) == ("0", (Message("user", "Describe.", 1),), None)


@pytest.mark.parametrize("key", ["annotations", "questions"])
def test_questions_of_vqa(folder: Path, key: str) -> None:
    (folder / "COCO_val2014_000000000042.jpg").write_bytes(b"")
    answers = [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}]
    records = [
        {"image_id": 42, "question": "How many?", "question_id": 1, "answers": answers},
        {"image_id": "b", "question": "Where?", "question_id": 2, "multiple_choice_answer": "here"},
    ]
    path = folder / "vqa.json"
    path.write_text(json.dumps({"images": [{"id": "b", "file_name": "b.png"}], key: records}))
    first, second = read_data(path)
    assert (first.images, first.expected) == ((folder / "COCO_val2014_000000000042.jpg",), "2")
    assert (second.name, second.images, second.expected) == ("2", (folder / "b.png",), "here")


def test_the_requests_of_a_bench(folder: Path) -> None:
    (sample,) = read_data(written(folder, {"prompt": "Hi", "images": ["a.png"], "max_new_tokens": 8, "time": 0}))
    assert sample.messages == (Message("user", "Hi", 1),)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": []}, r"messages is \[\]; expected a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is of 'tool'; expected user, assistant or system"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of message 1 is .*; expected type text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
         "is a URL; download it"),
        ({"messages": [{"role": "user", "content": "<image><image>x"}], "images": ["a.png"]}, "turn 1 has 2 <image> marks"),
        ({"doc": {}, "target": "x", "input": "<image>Q?"}, "the log holds no image; give its path as doc.image"),
        ({"image_id": 5, "question": "Q?", "question_id": 1}, "no image of the id 5"),
        ({"index": "1", "question": "Q?", "image": "%%%"}, "the image is not valid base64"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_others(folder: Path, record: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"data\.json, line 2: .*{said}"):
        read_data(written(folder, {"prompt": "fine"}, record))
