"""Qwen-VL: a picture is a span <img>...</img> whose inside is replaced by rows of features; chats are ChatML.

Text becomes ids piece by piece, as in the original code: in a chat only the tags of pictures and boxes count as special
tokens, so that "<|im_end|>" typed by a user stays text. One thing differs: between <img> and </img> the original writes the
bytes of the picture's path, which the network never sees; here the padding token stands in every position.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

import numpy as np

from ..artifact import ModelFacts
from ..images import ImageSource
from ..prompt import Message, Prompt, PromptError
from ..rope import ntk_factor
from ..tagged_boxes import parse_boxes
from ..tiktoken_vocabulary import TAGS, TiktokenVocabulary
from ..tokenizer import PICTURE, Tokenizer, check_unicode
from .fusion import fuse
from .llava import picture_rows

__all__ = ["chat_prompt", "parse_boxes", "raw_prompt"]

OPEN, CLOSE = "<img>", "</img>"
SPAN = re.compile(re.escape(OPEN) + "(.*?)" + re.escape(CLOSE), re.DOTALL)
# An assistant's earlier words may point at things; they bring no pictures.
POINTING = TAGS - {OPEN, CLOSE, "<imgpad>"}
SYSTEM = Message("system", "You are a helpful assistant.")


def chat_prompt(
    messages: Sequence[Message],
    images: Sequence[ImageSource],
    facts: ModelFacts,
    tokenizer: Tokenizer,
    template: str,
    *,
    add_generation_prompt: bool = True,
) -> Prompt:
    """The prompt of a conversation: ChatML, or for a base model (facts.chat "raw") its turns as lines of text.

    Pictures stand as "Picture k: <img>...</img>" lines before the text of their message, k counting over the conversation,
    unless the text says where. A mark for which no picture was given is refused: what stands in it is never opened.
    The whole conversation is kept, however long. `template` is not used.

    Raises PromptError, ImageError, TokenizerError.
    """
    marked = mark_pictures(messages)
    if facts.chat == "raw":
        return _prompt(_lines(marked, tokenizer), images, facts)
    if not marked or marked[0].role != "system":
        marked = [SYSTEM, *marked]
    return _prompt(_chatml(marked, tokenizer, add_generation_prompt=add_generation_prompt), images, facts)


def raw_prompt(text: str, images: Sequence[ImageSource], facts: ModelFacts, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a text as it is. Every special token written in it is one.

    With pictures, they fill the <img>...</img> spans in order, whatever stands inside; without, the inside is the picture's
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
    return _prompt(_encode_spans(text, tokenizer, None), images or paths, facts)


def mark_pictures(messages: Sequence[Message]) -> list[Message]:
    """Messages whose texts hold a mark for each of their pictures; raises PromptError where marks and pictures differ."""
    marked, seen = [], 0
    for message in messages:
        text = message.text
        if message.role == "user":
            if OPEN in text or CLOSE in text:
                _check_count(len(spans(text)), message.images, "the message")
            else:
                lines = (f"Picture {k}: {OPEN}{CLOSE}\n" for k in range(seen + 1, seen + 1 + message.images))
                text = "".join(lines) + text
            seen += message.images
        marked.append(dataclasses.replace(message, text=text))
    return marked


def spans(text: str) -> list[str]:
    """What stands in each <img>...</img>; raises PromptError for tags that do not pair up."""
    found = SPAN.findall(text)
    if any(tag in SPAN.sub("", text) for tag in (OPEN, CLOSE)) or any(OPEN in inside for inside in found):
        raise PromptError(f"the prompt has {OPEN} and {CLOSE} that do not pair up; write {OPEN}path{CLOSE} for each picture")
    return found


def _check_count(marks: int, images: int, where: str) -> None:
    if marks != images:
        given = f"{images} image{' was' if images == 1 else 's were'} given"
        raise PromptError(
            f"{where} has {marks} {OPEN}...{CLOSE} mark{'' if marks == 1 else 's'} but {given} with it; write one mark for "
            "each image, or leave all marks out; only raw prompts without images may name pictures by their path"
        )


def _lines(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    newline = _encode("\n", tokenizer, ())
    ids: list[int] = []
    for place, message in enumerate(messages):
        ids += [*(newline if place else ()), *_encode_text(message, tokenizer)]
    return ids


def _chatml(messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> list[int]:
    newline = _encode("\n", tokenizer, ())
    start, end = (_token_id(tokenizer, name) for name in ("<|im_start|>", "<|im_end|>"))
    ids: list[int] = []
    for message in messages:
        role, text = _encode(message.role, tokenizer, ()), _encode_text(message, tokenizer)
        ids += [*(newline if ids else ()), start, *role, *newline, *text, end]
    if add_generation_prompt:
        ids += [*newline, start, *_encode("assistant", tokenizer, ()), *newline]
    return ids


def _encode_text(message: Message, tokenizer: Tokenizer) -> list[int]:
    """Ids of one message with PICTURE in the spans of a user's."""
    if message.role == "user":
        return _encode_spans(message.text, tokenizer, TAGS)
    return _encode(message.text, tokenizer, POINTING)


def _encode_spans(text: str, tokenizer: Tokenizer, specials: Collection[str] | None) -> list[int]:
    first, *others = SPAN.split(text)[::2]
    ids = _encode(first, tokenizer, specials)
    for piece in others:
        ids += [_token_id(tokenizer, OPEN), PICTURE, _token_id(tokenizer, CLOSE), *_encode(piece, tokenizer, specials)]
    return ids


def _encode(text: str, tokenizer: Tokenizer, specials: Collection[str] | None) -> list[int]:
    """Ids of a text in which only `specials` are special tokens (default: all)."""
    check_unicode(text)
    assert isinstance(tokenizer.vocabulary, TiktokenVocabulary)  # the compiler accepts no other for this family
    return tokenizer.vocabulary.encode(text, specials=specials)


def _token_id(tokenizer: Tokenizer, name: str) -> int:
    return tokenizer.facts.added_tokens[name]


def _prompt(ids: Sequence[int], images: Sequence[ImageSource], facts: ModelFacts) -> Prompt:
    fused = fuse(np.array(ids, dtype=np.int32), images, facts, picture_rows)
    alpha = ntk_factor(facts.rope, fused.length)
    # Cached keys are rotated by the base that alpha gives: under another alpha nothing of a slot can be kept.
    state = np.full(fused.length, int(alpha), dtype=np.int32)
    return dataclasses.replace(fused, ntk=alpha, state=state)
