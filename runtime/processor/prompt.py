"""Messages of a chat, and the Prompt that a processor makes of them.

Legend: L positions of the prompt, S side of a tile, P rows of features per tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .images import Frame, ImageSource


class PromptError(ValueError):
    """A prompt that cannot be run; the error says what to change."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image in a message; the images of a conversation are given beside its messages, in the same order.

    inline: a mark in a plain text gives the place of the image: nothing is put around it, and no template moves it.
    """

    inline: bool = False


IMAGE = ImagePart()
Part = str | ImagePart


@dataclass(frozen=True, slots=True, init=False)
class Message:
    """One turn of a chat: who speaks, and the texts and images of the turn in order.

    Images come from image parts alone: a mark or a special token that a text part spells is words.
    """

    role: str  # system | user | assistant
    parts: tuple[Part, ...]

    def __init__(self, role: str, text: str | Sequence[Part] = "", images: int = 0) -> None:
        """`text`: parts in order, or one text, before which `images` images stand."""
        parts = (text,) if isinstance(text, str) else tuple(text)
        if wrong := next((part for part in parts if not isinstance(part, str | ImagePart)), None):
            raise PromptError(f"a part of a message is {type(wrong).__name__}; expected text or IMAGE")
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "parts", (IMAGE,) * images + parts)

    @property
    def images(self) -> int:
        """The number of images of the turn."""
        return sum(isinstance(part, ImagePart) for part in self.parts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text parts in order."""
        return tuple(part for part in self.parts if isinstance(part, str))

    @property
    def text(self) -> str:
        """All texts, one after the other."""
        return "".join(self.texts)


Turn = str | Message  # of the user
Images = Sequence[ImageSource] | ImageSource | None


def check_text(text: Any) -> str:
    """The text; raises PromptError for anything else."""
    if not isinstance(text, str):
        raise PromptError(f"a prompt is {type(text).__name__}; expected text")
    return text


def check_turn(turn: Any) -> Turn:
    """The turn of a user; raises PromptError unless it is text or a Message."""
    return turn if isinstance(turn, Message) else check_text(turn)


def check_messages(messages: Any) -> list[Message]:
    """The messages of a conversation; raises PromptError unless they are a list of Messages."""
    if not isinstance(messages, list | tuple):
        raise PromptError(f"a prompt is {type(messages).__name__}; expected text, a Message or a list of Messages")
    if other := next((each for each in messages if not isinstance(each, Message)), None):
        raise PromptError(f"a message of a conversation is {type(other).__name__}; expected a Message")
    return list(messages)


def as_list(images: Any) -> list[ImageSource]:
    """One image, several or none as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def pair_up(prompts: Sequence[Turn], images: Any) -> list[tuple[Turn, Any]]:
    """Each prompt with its images; raises PromptError unless `images` is None or a list with an entry for each prompt."""
    if not isinstance(prompts, list | tuple):
        raise PromptError(f"prompts is {type(prompts).__name__}; expected a text or a list of texts")
    if images is None:
        return [(prompt, None) for prompt in prompts]
    if not isinstance(images, list | tuple) or len(images) != len(prompts):
        count = len(images) if isinstance(images, list | tuple) else "one entry that is no list"
        raise PromptError(
            f"{len(prompts)} prompts were given but images has {count}; give a list with one entry for each prompt: an image, "
            "a list of them, or None"
        )
    return list(zip(prompts, images, strict=True))


def instruction_in_user(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation with its system message as text of the first user turn, after the images at the start of the turn.

    None where there is no system message, or no turn of a user.
    """
    first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
    if not messages or messages[0].role != "system" or first is None:
        return None
    parts = messages[first].parts
    start = next((place for place, part in enumerate(parts) if isinstance(part, str)), len(parts))
    instruction = "\n".join(messages[0].texts).strip() + "\n\n"
    text = parts[start] if start < len(parts) else ""
    assert isinstance(text, str)
    turn = Message("user", (*parts[:start], instruction + text, *parts[start + 1 :]))
    return [*messages[1:first], turn, *messages[first + 1 :]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossAttentionMask:
    """The tiles that each position attends to, where images enter by cross-attention. N images of t tiles each."""

    visible: np.ndarray  # bool [L, N * t]: the tiles that a position attends to
    gates: np.ndarray  # float32 [L, 2]: factors 0 or 1 of a cross layer's attention and of its MLP


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A prompt as arrays for the graphs. The arrays are not written once it is made."""

    token_ids: np.ndarray  # int32 [L]; at image positions the image token, or 0 where images have no id
    rows: np.ndarray  # int32 [L]; -1: embed the token id, else that row of the features [tiles * P, C]
    pixels: np.ndarray  # uint8 [tiles, S, S, 3], in the order of the rows
    frames: tuple[Frame, ...]  # one per image, in the order given
    image_tokens: int  # positions that images take
    grids: np.ndarray | None = None  # int32 [images, 2]: (rows, columns) of tiles of each, where images have tiles
    cross_attention: CrossAttentionMask | None = None  # cross-attention only, and only with images
    ntk: float = 1.0  # dynamic NTK: the base's factor before its exponent, fixed by this prompt's length
    # int32 [L]: what the keys and values of a position depend on besides the positions up to it. A chat may keep cached
    # positions only where this agrees too.
    state: np.ndarray

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return int(self.token_ids.size)

    @property
    def text_tokens(self) -> int:
        """Positions that text takes."""
        return self.length - self.image_tokens
