"""Model families: what differs between them on the host, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..artifact import ModelFacts
from ..boxes import Box
from ..images import Frame, ImageSource
from ..prompt import Message, Prompt
from ..tokenizer import Tokenizer
from . import llava


class Family(Protocol):
    """What a family provides; each is a module with these functions."""

    @staticmethod
    def to_text(
        messages: Sequence[Message],
        template: str,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a chat, with the family's mark where pictures stand."""
        ...

    @staticmethod
    def prepare(text: str, images: Sequence[ImageSource], facts: ModelFacts, tokenizer: Tokenizer) -> Prompt:
        """Ids, feature rows and pixels of a prompt text; raises PromptError, ImageError or TokenizerError."""
        ...

    @staticmethod
    def parse_boxes(text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
        """Boxes in an answer."""
        ...


_FAMILIES: dict[str, Family] = {"llava": llava}


def family(name: str) -> Family:
    """The family that a manifest names; raises ValueError for one that this runtime does not know."""
    if name not in _FAMILIES:
        raise ValueError(f"the model family {name!r} is not known to this runtime; known: {', '.join(sorted(_FAMILIES))}")
    return _FAMILIES[name]
