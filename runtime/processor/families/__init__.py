"""Model families: what differs between them on the host, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...artifact import ModelInfo
from ...shown import quoted
from ..boxes import Box
from ..images import Frame, ImageSource
from ..prompt import Message, Part, Prompt
from ..tokenizer import Tokenizer
from . import llava, llava_next, mllama, qwen_vl


class Family(Protocol):
    """The interface of a family; each is a module with these functions."""

    @staticmethod
    def chat_prompt(
        messages: Sequence[Message],
        images: Sequence[ImageSource],
        info: ModelInfo,
        tokenizer: Tokenizer,
        template: str,
        *,
        add_generation_prompt: bool = True,
        system_in_user: bool = False,
    ) -> Prompt:
        """The prompt of a conversation, whose images are `images` in order; raises as raw_prompt, or ChatTemplateError.

        system_in_user: where the template refuses a system message, its text goes to the first user turn.
        """
        ...

    @staticmethod
    def parts_of(text: str, images: int, info: ModelInfo) -> tuple[Part, ...]:
        """A user's plain text and its images as parts: images stand first unless marks in the text say where.

        Without images a mark in the text is words. Raises PromptError when marks and images differ in number.
        """
        ...

    @staticmethod
    def raw_prompt(text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer) -> Prompt:
        """The prompt of a text as it is, with the family's marks where images stand.

        Raises PromptError, ImageError or TokenizerError.
        """
        ...

    @staticmethod
    def image_tokens(size: tuple[int, int], info: ModelInfo) -> int:
        """The number of prompt positions of an image; `size` is (width, height) in pixels."""
        ...

    @staticmethod
    def parse_boxes(text: str, frames: Sequence[Frame]) -> tuple[Box, ...]:
        """Boxes in an answer."""
        ...


FAMILIES: dict[str, Family] = {"llava": llava, "llava_next": llava_next, "mllama": mllama, "qwen_vl": qwen_vl}


def family(name: str) -> Family:
    """The family that a manifest names; raises ValueError for one that this runtime does not know."""
    if name not in FAMILIES:
        raise ValueError(f"the model family {quoted(name)} is not known to this runtime; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
