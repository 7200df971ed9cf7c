"""Records of conversations: of Qwen-VL and LLaVA, of LLaMA-Factory, messages of OpenAI's API, and lines of its batches.

    {"id": ..., "conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\\n..."}, {"from": "assistant", ...}]}
    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}
    {"messages": [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}], "images": ["a.jpg"]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", ...}]}]}
    {"custom_id": ..., "body": {"messages": [...]}}

Every turn of the assistant becomes a sample, after the turns before it; a conversation that ends with the user's is one without
an answer. Images are placed where the marks or parts of their turn are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.processor.prompt import IMAGE, Message, Part
from ...runtime.shown import quoted
from .prompts import images_of, name_of
from .records import Location
from .samples import Sample

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
MARK = "<image>"
QWEN_IMAGE = re.compile(r"(?:Picture \d+: ?)?<img>(.*?)</img>\n?")
Images = list[Path | bytes]


@dataclass(slots=True)
class _Conversation:
    """The turns so far, their images, and the images of the record that no mark has taken."""

    location: Location
    name: str
    files: Images
    turns: int
    may_end_open: bool
    messages: list[Message] = field(default_factory=list)
    images: Images = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    marked: bool = False  # images are those of the record, at its marks

    def add(self, role: str, parts: tuple[Part, ...], images: Images, number: int) -> None:
        """The next turn."""
        _check_order(self.messages, role, number, self.location)
        if role == "assistant":
            label = self.name if self.turns <= 2 else f"{self.name}, turn {number}"
            answer = "".join(part for part in parts if isinstance(part, str))
            self._sample(label, answer)
            self.messages.append(Message(role, answer))
            return
        self.images += images
        self.messages.append(Message(role, parts))

    def _sample(self, name: str, answer: str | None) -> None:
        self.samples.append(Sample(name=name, messages=tuple(self.messages), images=tuple(self.images), answer=answer))

    def end(self) -> list[Sample]:
        if self.files:
            raise self.location.error(f"{len(self.files)} of the images have no {MARK} mark; write {MARK} where each stands")
        if self.may_end_open and self.messages[-1].role == "user":
            self._sample(self.name if not self.samples else f"{self.name}, turn {self.turns}", None)
        if not self.samples:
            raise self.location.error("no turn is the assistant's; expected one that can be compared")
        return self.samples


def conversation(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A record with the key conversations."""
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise location.error(f"conversations is {quoted(turns)}; expected a list of turns")
    files: Images = list(images_of(record, location))
    talk = _Conversation(location, name_of(record, location), files, len(turns), may_end_open=False, marked=bool(files))
    for number, turn in enumerate(turns, 1):
        role, text = _turn(turn, number, location)
        talk.add(role, *_split_turn(text, talk, number), number)
    return talk.end()


def messages(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A record with the key messages, or with the key body that holds one."""
    body = record.get("body", record)
    turns = body.get("messages") if isinstance(body, Mapping) else None
    if not isinstance(turns, list) or not turns:
        raise location.error(f"messages is {quoted(turns)}; expected a list of messages")
    files: Images = list(images_of(record, location))
    name = name_of(record, location)
    talk = _Conversation(location, name, files, len(turns), may_end_open=True, marked=bool(files))
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
            raise location.error(f"message {number} is {quoted(turn)}; expected role and content")
        if turn["role"] not in ("user", "assistant", "system"):
            raise location.error(f"message {number} is of {quoted(turn['role'])}; expected user, assistant or system")
        if isinstance(turn["content"], list):
            parts, images = _content(turn["content"], number, location)
        else:
            text = location.text(turn["content"], f"message {number}")
            parts, images = _split_turn(text, talk, number) if talk.marked else ((text,), [])
        talk.add(turn["role"], parts, images, number)
    return talk.end()


def _content(content: list[Any], number: int, location: Location) -> tuple[tuple[Part, ...], Images]:
    """The parts of a message of OpenAI's API."""
    parts: list[Part] = []
    images: Images = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("text", "input_text"):
            parts.append(location.text(part.get("text"), f"message {number}"))
        elif kind in ("image_url", "input_image"):
            url = part.get("image_url")
            images.append(location.image(url.get("url") if isinstance(url, Mapping) else url))
            parts.append(IMAGE)
        elif kind == "image":
            images.append(location.image(part.get("image")))
            parts.append(IMAGE)
        else:
            raise location.error(f"a part of message {number} is {quoted(part)}; expected type text or image_url")
    return tuple(parts), images


def _turn(turn: Any, number: int, location: Location) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        raise location.error(f"turn {number} is {quoted(turn)}; expected from and value")
    if turn["from"] not in ROLES:
        raise location.error(f"turn {number} is from {quoted(turn['from'])}; expected one of {', '.join(ROLES)}")
    text = location.text(turn["value"], f"turn {number}")
    if not text.strip():
        raise location.error(f"turn {number} is empty; expected text")
    return ROLES[turn["from"]], text


def _check_order(messages: list[Message], role: str, number: int, location: Location) -> None:
    before = messages[-1].role if messages else None
    allowed = {None: ("user", "system"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}[before]
    if role not in allowed:
        raise location.error(
            f"turn {number} is the {role}'s after {before or 'nothing'}; expected the {' or '.join(allowed)}'s"
        )


def _split_turn(text: str, talk: _Conversation, number: int) -> tuple[tuple[Part, ...], Images]:
    """A turn's texts and images in order, and the files of these images, which are taken from the record's."""
    if not talk.marked and MARK not in text:
        first, *others = QWEN_IMAGE.split(text)
        return _parts([first, *others[1::2]]), [talk.location.file(name) for name in others[::2]]
    pieces = text.split(MARK)
    count = len(pieces) - 1
    if count > len(talk.files):
        raise talk.location.error(
            f"turn {number} has {count} {MARK} marks, but {len(talk.files)} images are left; give image or images"
        )
    return _parts(pieces), [talk.files.pop(0) for _ in range(count)]


def _parts(pieces: list[str]) -> tuple[Part, ...]:
    """Texts with an image between each two; lines that end at an image, and texts that are empty, are left out."""
    pieces = [piece.strip("\n") for piece in pieces]
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    parts: list[Part] = []
    for place, piece in enumerate(pieces):
        parts += [*([IMAGE] if place else []), *([piece] if piece.strip() else [])]
    return tuple(parts) if any(isinstance(part, str) for part in parts) else (*parts, "")
