"""`staticvl compile --calibrate FILE`, from the file to what is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from staticvl.runtime.processor.prompt import Message
from staticvl.tools.calibration_file import read_calibration
from staticvl.tools.cli import build_parser, main
from staticvl.tools.compile import read_options

from .conftest import EMBEDDED


def written(folder: Path, *records: dict[str, Any]) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "red").save(folder / name)
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


TURNS = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "And its colour?"},
    {"from": "gpt", "value": "Brown."},
]


def test_prompts_with_their_answers(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "What is this?", "images": ["a.png", "b.png"], "answer": "A cat."},
        {"prompt": "How many?", "image": "a.png", "expected": "Two."},
        {"prompt": "Hello."},
        {"id": "dog", "image": "b.png", "conversations": TURNS},
        {"id": "again", "image": "b.png", "conversations": TURNS[:2]},
    )
    first, second, third, whole, part = read_calibration(path).conversations
    assert first.messages == (Message("user", "What is this?", 2), Message("assistant", "A cat."))
    assert first.images == (tmp_path / "a.png", tmp_path / "b.png") and first.name == "line 1"
    assert second.messages[-1] == Message("assistant", "Two."), "the right answer, where none is given to be said"
    assert third.messages == (Message("user", "Hello."),) and not third.images
    assert [message.text for message in whole.messages] == ["What is this?", "A dog.", "And its colour?", "Brown."]
    assert len(part.messages) == 2, "a conversation is run once, not once for each of its turns"


def test_the_digest_is_of_images_too(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "What is this?", "images": ["a.png"]})
    before = read_calibration(path).sha256
    assert read_calibration(path).sha256 == before
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "b.png")
    assert read_calibration(path).sha256 == before, "an image that nobody asks about"
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "a.png")
    changed = read_calibration(path).sha256
    assert changed != before
    path.write_text(path.read_text().replace("What is", "Where is"))
    assert read_calibration(path).sha256 not in (before, changed)


def test_on_the_command_line_and_in_a_config_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "Hello."})
    config = tmp_path / "build.yaml"
    config.write_text(f"checkpoint: {EMBEDDED}\nout: a\nquant: w4a16\ncalibrate: prompts.jsonl\n")
    given = ["compile", str(EMBEDDED), "--out", "a", "--quant", "w4a16", "--calibrate", str(path)]
    for args in (given, ["compile", "--config", str(config)]):
        assert read_options(build_parser().parse_args(args)).calibration == read_calibration(path)
    assert read_options(build_parser().parse_args(given[:-2])).calibration is None


@pytest.mark.parametrize(
    ("content", "quant", "sentence"),
    [
        (None, "w4a16", 'prompts.jsonl is no file; expected JSON lines such as {"prompt"'),
        ("\n", "w4a16", "prompts.jsonl holds no samples; write one JSON object a line"),
        ('{"prompt": "Hello.", "images": ["c.png"]}', "w8a8", "prompts.jsonl, line 1: the image"),
        (
            '{"prompt": "Hello."}',
            "w8a16",
            "quantisation 'w8a16' has nothing to calibrate; calibrated are w4a16, w4a16-g32, w8a8",
        ),
        ('{"prompt": "Hello."}', "none", "quantisation 'none' has nothing to calibrate"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(
    content: str | None, quant: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    args = ["compile", str(EMBEDDED), "--out", str(tmp_path / "a"), "--quant", quant, "--calibrate", str(path)]
    assert main(args) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and line.startswith("staticvl: ")
    assert not (tmp_path / "a").exists()
