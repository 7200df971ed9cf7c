"""Qwen-VL: an image is a span <img>...</img> whose inside is replaced by rows of features; chats are ChatML.

Text becomes ids piece by piece, as in the original code: in a chat only the tags of boxes count as special tokens, so that
"<|im_end|>" typed by a user stays text. Two things differ: between <img> and </img> the original writes the bytes of the
image's path, which the network never sees; here the padding token stands in every position. And only image parts make such a
span: <img> in a text is words, where the original opens what stands in it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

import numpy as np

from ...artifact import ModelInfo
from ...rope import ntk_factor
from ..images import ImageSource
from ..prompt import ImagePart, Message, Part, Prompt, PromptError
from ..qwen_boxes import parse_boxes
from ..tiktoken_vocabulary import TAGS, TiktokenVocabulary
from ..tokenizer import IMAGE_ID, Tokenizer, check_unicode
from .fusion import fuse
from .llava import image_rows, image_tokens
from .marks import check_images

__all__ = ["chat_prompt", "image_tokens", "parse_boxes", "parts_of", "raw_prompt"]

OPEN, CLOSE = "<img>", "</img>"
SPAN = re.compile(re.escape(OPEN) + "(.*?)" + re.escape(CLOSE), re.DOTALL)
# Words may point at things; they bring no images.
POINTING = TAGS - {OPEN, CLOSE, "<imgpad>"}
SYSTEM = Message("system", "You are a helpful assistant.")


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
    """The prompt of a conversation: ChatML, or for a base model (info.chat "raw") its turns as lines of text.

    An image part is a line "Picture k: <img>...</img>", k counting over the conversation, or the span alone where it is inline.
    What a text has in <img>...</img> is words and never opened. The whole conversation is kept, however long. `template` and
    `system_in_user` are not used: a system message has its place here.

    Raises PromptError, ImageError, TokenizerError.
    """
    check_images(messages, images)
    if info.chat != "raw" and (not messages or messages[0].role != "system"):
        messages = [SYSTEM, *messages]
    turns = [(message.role, runs) for message, runs in zip(messages, runs_of(messages), strict=True)]
    if info.chat == "raw":
        return _prompt(_lines([runs for _, runs in turns], tokenizer), images, info)
    return _prompt(_chatml(turns, tokenizer, add_generation_prompt=add_generation_prompt), images, info)


def raw_prompt(text: str, images: Sequence[ImageSource], info: ModelInfo, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a text as it is. Every special token written in it is one.

    With images, they fill the <img>...</img> spans in order, whatever stands inside; without, the inside is the image's
    path or URL.

    Raises PromptError, ImageError, TokenizerError.
    """
    paths = spans(text)
    if images:
        _check_count(len(paths), len(images), "the prompt")
    elif "" in paths:
        raise PromptError(
            f"the prompt has an empty {OPEN}{CLOSE} mark and no images were given; write the path inside or give images"
        )
    return _prompt(_encode_runs(SPAN.split(text)[::2], tokenizer, None), images or paths, info)


def parts_of(text: str, images: int, info: ModelInfo) -> tuple[Part, ...]:
    """See Family.parts_of; a mark is <img>...</img>, whatever stands inside."""
    if not images or (OPEN not in text and CLOSE not in text):
        return Message("user", text, images).parts
    _check_count(len(spans(text)), images, "the message")
    first, *others = SPAN.split(text)[::2]
    return (first, *(part for other in others for part in (ImagePart(inline=True), other)))


def runs_of(messages: Sequence[Message]) -> list[list[str]]:
    """The runs of text of each message, between which its images stand, with what is written around these."""
    runs_by_message, number = [], 0
    for message in messages:
        runs = [""]
        for part in message.parts:
            if isinstance(part, str):
                runs[-1] += part
                continue
            number += 1
            runs[-1] += "" if part.inline else f"Picture {number}: "
            runs.append("" if part.inline else "\n")
        runs_by_message.append(runs)
    return runs_by_message


def spans(text: str) -> list[str]:
    """The contents of each <img>...</img>; raises PromptError for tags that do not pair up."""
    insides = SPAN.findall(text)
    if any(tag in SPAN.sub("", text) for tag in (OPEN, CLOSE)) or any(OPEN in inside for inside in insides):
        raise PromptError(f"the prompt has {OPEN} and {CLOSE} that do not pair up; write {OPEN}path{CLOSE} for each image")
    return insides


def _check_count(marks: int, images: int, where: str) -> None:
    if marks != images:
        count = f"{images} image{' was' if images == 1 else 's were'} given"
        raise PromptError(
            f"{where} has {marks} {OPEN}...{CLOSE} mark{'' if marks == 1 else 's'} but {count} with it; write one mark for "
            "each image, or leave all marks out; only raw prompts without images may name images by their path, and to quote a "
            "mark give a Message, in whose text a mark is words"
        )


def _lines(turns: Sequence[list[str]], tokenizer: Tokenizer) -> list[int]:
    newline = _encode("\n", tokenizer, ())
    ids: list[int] = []
    for place, runs in enumerate(turns):
        ids += [*(newline if place else ()), *_encode_runs(runs, tokenizer, POINTING)]
    return ids


def _chatml(turns: Sequence[tuple[str, list[str]]], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[int]:
    newline = _encode("\n", tokenizer, ())
    start, end = (_token_id(tokenizer, name) for name in ("<|im_start|>", "<|im_end|>"))
    ids: list[int] = []
    for role, runs in turns:
        text = _encode_runs(runs, tokenizer, POINTING)
        ids += [*(newline if ids else ()), start, *_encode(role, tokenizer, ()), *newline, *text, end]
    if add_generation_prompt:
        ids += [*newline, start, *_encode("assistant", tokenizer, ()), *newline]
    return ids


def _encode_runs(runs: Sequence[str], tokenizer: Tokenizer, specials: Collection[str] | None) -> list[int]:
    """Ids of runs of text with the span of an image between each two, IMAGE_ID in it."""
    ids = _encode(runs[0], tokenizer, specials)
    for run in runs[1:]:
        ids += [_token_id(tokenizer, OPEN), IMAGE_ID, _token_id(tokenizer, CLOSE), *_encode(run, tokenizer, specials)]
    return ids


def _encode(text: str, tokenizer: Tokenizer, specials: Collection[str] | None) -> list[int]:
    """Ids of a text in which only `specials` are special tokens (default: all)."""
    check_unicode(text)
    assert isinstance(tokenizer.vocabulary, TiktokenVocabulary)  # the compiler accepts no other for this family
    return tokenizer.vocabulary.encode(text, specials=specials)


def _token_id(tokenizer: Tokenizer, name: str) -> int:
    return tokenizer.config.added_tokens[name]


def _prompt(ids: Sequence[int], images: Sequence[ImageSource], info: ModelInfo) -> Prompt:
    prompt = fuse(np.array(ids, dtype=np.int32), images, info, image_rows)
    alpha = ntk_factor(info.rope, prompt.length)
    # Cached keys are rotated by a base that depends on alpha: with another alpha nothing of a slot can be kept.
    state = np.full(prompt.length, int(alpha), dtype=np.int32)
    return dataclasses.replace(prompt, ntk=alpha, state=state)
