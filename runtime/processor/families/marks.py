"""Conversations through a chat template, and marks of images in a prompt's text, for the families that have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ...artifact import ModelInfo
from ..chat_template import ChatTemplateError, TemplateLimitError, render
from ..guards import Guard, unguarded
from ..images import ImageSource
from ..prompt import ImagePart, Message, Part, Prompt, PromptError, instruction_in_user
from ..tokenizer import IMAGE_ID, Tokenizer, control_tokens

Content = str | list[dict[str, Any]]  # of one message, as templates expect it
MakeContent = Callable[[Message, str, Callable[[str], str]], Content]
MOVE = (
    "put the instruction into the first user turn: load the model with system_in_user=True, start the server with "
    "--system-in-user, or write it there"
)


class RawPrompt(Protocol):
    """A family's raw_prompt; special tokens that `guard` breaks up are words."""

    def __call__(
        self, text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer, *, guard: str = ""
    ) -> Prompt: ...


def to_text(messages: Sequence[Message], template: str, info: ModelInfo, tokenizer: Tokenizer, **settings: Any) -> str:
    """The prompt of a conversation as text without guards; arguments and errors as of `rendered`."""
    return unguarded(*rendered(messages, template, info, tokenizer, **settings))


def rendered(
    messages: Sequence[Message],
    template: str,
    info: ModelInfo,
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool = True,
    system_in_user: bool = False,
    content: MakeContent | None = None,
) -> tuple[str, str]:
    """The text that the template makes of a conversation, and the guard that stands in special tokens that are words.

    `content` makes the content for the template of a message, the mark and a function that guards words. system_in_user: where
    the template refuses a system message, its text goes to the first user turn.

    Raises ChatTemplateError when the template refuses the messages.
    """
    eos = info.eos_token_ids
    guard = Guard(control_tokens(tokenizer, template, info.image.mark, eos))
    make = content or parts_in_order

    def text_of(talk: Sequence[Message]) -> str:
        return render(
            template,
            [{"role": guard.words(each.role), "content": make(each, info.image.mark, guard.words)} for each in talk],
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.token(info.tokenizer.bos_token_id),
            eos_token=tokenizer.token(eos[0]),
        )

    try:
        return text_of(messages), guard.mark
    except TemplateLimitError:
        raise
    except ChatTemplateError as error:
        if (text := _with_moved_instruction(messages, text_of)) is None:
            raise
        if not system_in_user:
            raise ChatTemplateError(f"{str(error).rstrip('.')}; {MOVE}") from error
        return text, guard.mark


def _with_moved_instruction(messages: Sequence[Message], text_of: Callable[[Sequence[Message]], str]) -> str | None:
    """The text of the conversation with its system message in the first user turn; None where that is refused too."""
    conversation = instruction_in_user(messages)
    try:
        return None if conversation is None else text_of(conversation)
    except ChatTemplateError:
        return None


def chat_by(rendered: Callable[..., tuple[str, str]], raw_prompt: RawPrompt):
    """A family's `chat_prompt`: the prompt of the text that the template makes."""

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
        check_images(messages, images)
        settings = {"add_generation_prompt": add_generation_prompt, "system_in_user": system_in_user}
        text, guard = rendered(messages, template, info, tokenizer, **settings)
        return raw_prompt(text, images, info, tokenizer, guard=guard)

    return chat_prompt


def parts_in_order(message: Message, mark: str, words: Callable[[str], str]) -> Content:
    """The parts as content for the template. An inline image is its mark within the text around it."""
    content: list[dict[str, Any]] = []
    goes_on = False  # whether the next text belongs to the last one
    for part in message.parts:
        if part == ImagePart(inline=False):
            content.append({"type": "image"})
            continue
        inline = isinstance(part, ImagePart)
        text = words(part) if isinstance(part, str) else mark
        if (inline or goes_on) and content and content[-1]["type"] == "text":
            content[-1]["text"] += text
        else:
            content.append({"type": "text", "text": text})
        goes_on = inline
    return content


def parts_of(text: str, images: int, info: ModelInfo) -> tuple[Part, ...]:
    """A user's plain text and its images as parts: images stand first unless marks in the text say where.

    Without images a mark in the text is words. Raises PromptError when marks and images differ in number.
    """
    mark = info.image.mark
    if not images or mark not in text:
        return Message("user", text, images).parts
    first, *others = text.split(mark)
    if len(others) != images:
        raise PromptError(
            f"{_differ(len(others), images, mark)}; to quote a mark give a Message, in whose text a mark is words"
        )
    return (first, *(part for other in others for part in (ImagePart(inline=True), other)))


def check_images(messages: Sequence[Message], images: Sequence[ImageSource]) -> None:
    """Raise PromptError unless there is an image for every image part."""
    parts = sum(message.images for message in messages)
    if parts != len(images):
        raise PromptError(
            f"the messages have {_count(parts, 'image part')} but {_count(len(images), 'image')} "
            f"{'was' if len(images) == 1 else 'were'} given; give one image for each image part, in the same order"
        )


def check_ids(ids: np.ndarray, images: int, info: ModelInfo) -> None:
    """Raise PromptError unless `ids`, int32 [L] with IMAGE_ID at the marks, is a prompt for `images` images."""
    marks = int(np.count_nonzero(ids == IMAGE_ID))
    if marks != images:
        raise PromptError(_differ(marks, images, info.image.mark))
    if not ids.size:
        raise PromptError("the prompt is empty; expected some text or an image")
    if ids.max() >= info.vocab_size:
        raise PromptError(
            f"the prompt holds token {ids.max()} but the model knows {info.vocab_size} tokens; "
            "take the special token that the tokenizer adds out of the text"
        )


def _differ(marks: int, images: int, mark: str) -> str:
    return (
        f"the prompt has {_count(marks, mark + ' mark')} but {_count(images, 'image')} "
        f"{'was' if images == 1 else 'were'} given; write {mark} once for each image, or leave all marks out"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
