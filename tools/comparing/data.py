"""Data files -> samples: JSON lines of prompts, and the two conversation formats that these models are trained with.

    {"prompt": "...", "images": ["a.jpg"], "answer": "...", "expected": "...", "boxes": [[x1, y1, x2, y2]]}
    {"id": ..., "conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\\n..."}, {"from": "assistant", ...}]}
    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}

One object a line, or a JSON list of them. Every turn of the assistant in a conversation becomes a sample, behind the
turns before it. Images stand in their turn where its marks stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...runtime.processor.prompt import IMAGE, Message, Part
from ...runtime.shown import quoted, shown
from .samples import Box, DataError, Sample, asked

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
    samples = [sample for line, record in _records(text, path) for sample in _samples(record, _Where(path, line), folder)]
    if not samples:
        raise DataError(f'{path} holds no samples; write one JSON object a line, e.g. {{"prompt": "What is this?"}}')
    return samples


class _Where:
    """Makes errors that name file and line."""

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
                raise _Where(path, number).error(
                    f"not JSON ({error.msg}, column {error.colno}); write one object a line"
                ) from None


def _listed(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    while True:
        at = _past(text, at, " \t\r\n,")
        if at == len(text) or text[at] == "]":
            return
        line = text.count("\n", 0, at) + 1
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _Where(path, error.lineno).error(f"not JSON ({error.msg}); check the list") from None
        yield line, record


def _past(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


def _samples(record: Any, where: _Where, folder: Path) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise where.error(f'{quoted(record)} is no object; expected {{"prompt": ...}} or {{"conversations": ...}}')
    if "conversations" in record:
        return _conversation(record, where, folder)
    if "prompt" in record:
        return [_prompt(record, where, folder)]
    raise where.error(
        f"neither prompt nor conversations among {shown(', '.join(map(str, record))) or 'no keys'}; add one of them"
    )


def _prompt(record: Mapping[str, Any], where: _Where, folder: Path) -> Sample:
    if unknown := sorted(set(record) - set(PROMPT_KEYS)):
        raise where.error(f"unknown keys {shown(', '.join(unknown))}; expected {', '.join(PROMPT_KEYS)}")
    texts = {key: _text(record[key], key, where) for key in ("prompt", "answer", "expected") if record.get(key) is not None}
    images = _images(record, where, folder)
    name = str(record.get("id", f"line {where.line}"))
    prompt = texts.pop("prompt", None)
    if prompt is None:
        raise where.error("prompt is null; expected text")
    if texts.get("answer") == "":
        raise where.error("answer is empty; leave it out to use what the reference says")
    return asked(name, prompt, images, boxes=_boxes(record.get("boxes"), where), **texts)


def _conversation(record: Mapping[str, Any], where: _Where, folder: Path) -> list[Sample]:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise where.error(f"conversations is {quoted(turns)}; expected a list of turns")
    name = str(record.get("id", f"line {where.line}"))
    given = list(_images(record, where, folder))
    marked = given != []
    messages: list[Message] = []
    shown: list[Path] = []
    samples: list[Sample] = []
    for number, turn in enumerate(turns, 1):
        role, text = _turn(turn, number, where)
        _check_order(messages, role, number, where)
        if role == "assistant":
            label = name if len(turns) <= 2 else f"{name}, turn {number}"
            samples.append(Sample(name=label, messages=tuple(messages), images=tuple(shown), answer=text))
            messages.append(Message(role, text))
            continue
        parts, images = _cut(text, given, marked, number, where, folder)
        shown += images
        messages.append(Message(role, parts))
    if given:
        raise where.error(f"{len(given)} of the images have no {MARK} mark; write {MARK} where each stands")
    if not samples:
        raise where.error("no turn is the assistant's; expected one that can be compared")
    return samples


def _turn(turn: Any, number: int, where: _Where) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        raise where.error(f"turn {number} is {quoted(turn)}; expected from and value")
    if turn["from"] not in ROLES:
        raise where.error(f"turn {number} is from {quoted(turn['from'])}; expected one of {', '.join(ROLES)}")
    text = _text(turn["value"], f"turn {number}", where)
    if not text.strip():
        raise where.error(f"turn {number} is empty; expected text")
    return ROLES[turn["from"]], text


def _check_order(messages: list[Message], role: str, number: int, where: _Where) -> None:
    before = messages[-1].role if messages else None
    allowed = {None: ("user", "system"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
    if role not in allowed:
        raise where.error(f"turn {number} is the {role}'s behind {before or 'nothing'}; expected the {' or '.join(allowed)}'s")


def _cut(
    text: str, given: list[Path], marked: bool, number: int, where: _Where, folder: Path
) -> tuple[tuple[Part, ...], list[Path]]:
    """A turn's texts and images in order, and the files of these."""
    if not marked and MARK not in text:
        first, *others = QWEN_IMAGE.split(text)
        return _parts([first, *others[1::2]]), [_file(name, where, folder) for name in others[::2]]
    pieces = text.split(MARK)
    count = len(pieces) - 1
    if count > len(given):
        raise where.error(f"turn {number} has {count} {MARK} marks, but {len(given)} images are left; give image or images")
    return _parts(pieces), [given.pop(0) for _ in range(count)]


def _parts(pieces: list[str]) -> tuple[Part, ...]:
    """Texts with an image between each two; lines that end at an image, and texts that are empty, are left out."""
    pieces = [piece.strip("\n") for piece in pieces]
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        parts += [*([IMAGE] if place else []), *([piece] if piece.strip() else [])]
    return tuple(parts) if any(isinstance(part, str) for part in parts) else (*parts, "")


def _images(record: Mapping[str, Any], where: _Where, folder: Path) -> tuple[Path, ...]:
    if record.get("image") is not None and record.get("images") is not None:
        raise where.error("both image and images are given; leave one out")
    value = record.get("image") if record.get("images") is None else record["images"]
    names = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(_file(name, where, folder) for name in names)


def _file(name: Any, where: _Where, folder: Path) -> Path:
    if not isinstance(name, str):
        raise where.error(f"an image is {quoted(name)}; expected the path of a file")
    path = folder / name
    if not path.is_file():
        raise where.error(f"the image {shown(path)} is not there; paths are relative to the file, or to --image-folder")
    return path


def _boxes(value: Any, where: _Where) -> tuple[Box, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(_is_box(box) for box in value):
        raise where.error(
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


def _text(value: Any, what: str, where: _Where) -> str:
    if not isinstance(value, str):
        raise where.error(f"{what} is {quoted(value)}; expected text")
    return value
