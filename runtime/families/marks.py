"""Marks of pictures in a prompt's text, for the families whose conversations go through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..artifact import ModelFacts
from ..chat_template import render
from ..images import ImageSource
from ..prompt import Message, Prompt, PromptError
from ..tokenizer import PICTURE, Tokenizer

Content = str | list[dict[str, Any]]  # of one message, as templates expect it


def to_text(
    messages: Sequence[Message],
    template: str,
    facts: ModelFacts,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    content: Callable[[Message, str], Content] | None = None,
) -> str:
    """The prompt text of a conversation; `content` makes a message and the mark into what the template is given.

    Raises ChatTemplateError when the template refuses the messages.
    """
    make = content or pictures_first
    return render(
        template,
        [{"role": message.role, "content": make(message, facts.image.mark)} for message in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=tokenizer.token(facts.tokenizer.bos_token_id),
        eos_token=tokenizer.token(facts.eos_token_ids[0]),
    )


def chat_by(to_text: Callable[..., str], raw_prompt: Callable[[str, Sequence[ImageSource], ModelFacts, Tokenizer], Prompt]):
    """A family's `chat_prompt`: the prompt of the text that the template makes."""

    def chat_prompt(
        messages: Sequence[Message],
        images: Sequence[ImageSource],
        facts: ModelFacts,
        tokenizer: Tokenizer,
        template: str,
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        text = to_text(messages, template, facts, tokenizer, add_generation_prompt=add_generation_prompt)
        return raw_prompt(text, images, facts, tokenizer)

    return chat_prompt


def pictures_first(message: Message, mark: str) -> Content:
    """Pictures come before the text of their turn unless the text says where they stand."""
    images = 0 if mark in message.text else message.images
    return [{"type": "image"}] * images + [{"type": "text", "text": message.text}]


def check_ids(ids: np.ndarray, images: int, facts: ModelFacts) -> None:
    """Raise PromptError unless `ids`, int32 [L] with PICTURE at the marks, is a prompt for `images` pictures."""
    marks = int(np.count_nonzero(ids == PICTURE))
    if marks != images:
        raise PromptError(
            f"the prompt has {_count(marks, facts.image.mark + ' mark')} but {_count(images, 'image')} "
            f"{'was' if images == 1 else 'were'} given; write {facts.image.mark} once for each image, or leave all marks out"
        )
    if not ids.size:
        raise PromptError("the prompt is empty; expected some text or an image")
    if ids.max() >= facts.vocab_size:
        raise PromptError(
            f"the prompt holds token {ids.max()} but the model knows {facts.vocab_size} tokens; "
            "take the special token that the tokenizer adds out of the text"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
