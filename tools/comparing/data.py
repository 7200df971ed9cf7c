"""Data files -> samples: JSON lines of prompts, and the two conversation formats that these models are trained with.

    {"prompt": "...", "images": ["a.jpg"], "answer": "...", "expected": "...", "boxes": [[x1, y1, x2, y2]]}
    {"id": ..., "conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\\n..."}, {"from": "assistant", ...}]}
    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}

One object a line, or a JSON list of them. Every turn of the assistant in a conversation becomes a sample, after the
turns before it. Images are placed where the marks of their turn are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...runtime.processor.prompt import IMAGE, Message, Part
from ...runtime.shown import quoted, shown
from .samples import Box, DataError, Sample, user_sample

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
PROMPT_KEYS = ("prompt", "image", "images", "answer", "expected", "boxes", "id")
MARK = "<image>"
QWEN_IMAGE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?")


def read_data(path: Path, image_folder: Path | None = None) -> list[Sample]:
    """Every sample of a file; images lie beside it or in `image_folder`. Raises DataError with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    folder = image_folder or path.parent
    samples = [sample for line, record in _records(text, path) for sample in _samples(record, _Location(path, line), folder)]
    if not samples:
        raise DataError(f'{path} holds no samples; write one JSON object a line, e.g. {{"prompt": "What is this?"}}')
    return samples


class _Location:
    """A line of a file, for errors that name both."""

    def __init__(self, path: Path, line: int) -> None:
        self.path, self.line = path, line

    def error(self, text: str) -> DataError:
        return DataError(f"{self.path}, line {self.line}: {text}")


def _records(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Objects with the lines that they begin in."""
    if text.lstrip().startswith("["):
        yield from _listed(text, path)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise _Location(path, number).error(
                    f"not JSON ({error.msg}, column {error.colno}); write one object a line"
                ) from None


def _listed(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    while True:
        position = _after(text, position, " \t\r\n,")
        if position == len(text) or text[position] == "]":
            return
        line = text.count("\n", 0, position) + 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _Location(path, error.lineno).error(f"not JSON ({error.msg}); check the list") from None
        yield line, record


def _after(text: str, position: int, characters: str) -> int:
    """The first position from `position` on that holds none of these characters."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _samples(record: Any, location: _Location, folder: Path) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise location.error(f'{quoted(record)} is no object; expected {{"prompt": ...}} or {{"conversations": ...}}')
    if "conversations" in record:
        return _conversation(record, location, folder)
    if "prompt" in record:
        return [_prompt(record, location, folder)]
    raise location.error(
        f"neither prompt nor conversations among {shown(', '.join(map(str, record))) or 'no keys'}; add one of them"
    )


def _prompt(record: Mapping[str, Any], location: _Location, folder: Path) -> Sample:
    if unknown := sorted(set(record) - set(PROMPT_KEYS)):
        raise location.error(f"unknown keys {shown(', '.join(unknown))}; expected {', '.join(PROMPT_KEYS)}")
    texts = {key: _text(record[key], key, location) for key in ("prompt", "answer", "expected") if record.get(key) is not None}
    images = _images(record, location, folder)
    name = str(record.get("id", f"line {location.line}"))
    prompt = texts.pop("prompt", None)
    if prompt is None:
        raise location.error("prompt is null; expected text")
    if texts.get("answer") == "":
        raise location.error("answer is empty; leave it out to use the reference's own")
    return user_sample(name, prompt, images, boxes=_boxes(record.get("boxes"), location), **texts)


def _conversation(record: Mapping[str, Any], location: _Location, folder: Path) -> list[Sample]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise location.error(f"conversations is {quoted(turns)}; expected a list of turns")
    name = str(record.get("id", f"line {location.line}"))
    files = list(_images(record, location, folder))
    listed = files != []
    messages: list[Message] = []
    shown: list[Path] = []
    samples: list[Sample] = []
    for number, turn in enumerate(turns, 1):
        role, text = _turn(turn, number, location)
        _check_order(messages, role, number, location)
        if role == "assistant":
            label = name if len(turns) <= 2 else f"{name}, turn {number}"
            samples.append(Sample(name=label, messages=tuple(messages), images=tuple(shown), answer=text))
            messages.append(Message(role, text))
            continue
        parts, images = _split_turn(text, files, listed, number, location, folder)
        shown += images
        messages.append(Message(role, parts))
    if files:
        raise location.error(f"{len(files)} of the images have no {MARK} mark; write {MARK} where each stands")
    if not samples:
        raise location.error("no turn is the assistant's; expected one that can be compared")
    return samples


def _turn(turn: Any, number: int, location: _Location) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        raise location.error(f"turn {number} is {quoted(turn)}; expected from and value")
    if turn["from"] not in ROLES:
        raise location.error(f"turn {number} is from {quoted(turn['from'])}; expected one of {', '.join(ROLES)}")
    text = _text(turn["value"], f"turn {number}", location)
    if not text.strip():
        raise location.error(f"turn {number} is empty; expected text")
    return ROLES[turn["from"]], text


def _check_order(messages: list[Message], role: str, number: int, location: _Location) -> None:
    before = messages[-1].role if messages else None
    allowed = {None: ("user", "system"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
    if role not in allowed:
        raise location.error(
            f"turn {number} is the {role}'s after {before or 'nothing'}; expected the {' or '.join(allowed)}'s"
        )


def _split_turn(
    text: str, files: list[Path], listed: bool, number: int, location: _Location, folder: Path
) -> tuple[tuple[Part, ...], list[Path]]:
    """A turn's texts and images in order, and the files of these images. `files`: those of the record, if it `listed` any."""
    if not listed and MARK not in text:
        first, *others = QWEN_IMAGE.split(text)
        return _parts([first, *others[1::2]]), [_file(name, location, folder) for name in others[::2]]
    pieces = text.split(MARK)
    count = len(pieces) - 1
    if count > len(files):
        raise location.error(f"turn {number} has {count} {MARK} marks, but {len(files)} images are left; give image or images")
    return _parts(pieces), [files.pop(0) for _ in range(count)]


def _parts(pieces: list[str]) -> tuple[Part, ...]:
    """Texts with an image between each two; lines that end at an image, and texts that are empty, are left out."""
    pieces = [piece.strip("\n") for piece in pieces]
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        parts += [*([IMAGE] if place else []), *([piece] if piece.strip() else [])]
    return tuple(parts) if any(isinstance(part, str) for part in parts) else (*parts, "")


def _images(record: Mapping[str, Any], location: _Location, folder: Path) -> tuple[Path, ...]:
    if record.get("image") is not None and record.get("images") is not None:
        raise location.error("both image and images are given; leave one out")
    value = record.get("image") if record.get("images") is None else record["images"]
    names = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_file(name, location, folder) for name in names)


def _file(name: Any, location: _Location, folder: Path) -> Path:
    if not isinstance(name, str):
        raise location.error(f"an image is {quoted(name)}; expected the path of a file")
    path = folder / name
    if not path.is_file():
        raise location.error(f"the image {shown(path)} is not there; paths are relative to the file, or to --image-folder")
    return path


def _boxes(value: Any, location: _Location) -> tuple[Box, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(_is_box(box) for box in value):
        raise location.error(
            f"boxes is {quoted(value)}; expected a list of [x1, y1, x2, y2] as fractions of the image, x1 <= x2 and y1 <= y2"
        )
    return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in value)


def _is_box(value: Any) -> bool:
    number: Callable[[Any], bool] = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1  # noqa: E731
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(map(number, value))
        and value[0] <= value[2]
        and value[1] <= value[3]
    )


def _text(value: Any, name: str, location: _Location) -> str:
    if not isinstance(value, str):
        raise location.error(f"{name} is {quoted(value)}; expected text")
    return value
