"""Text to token ids and back, from a tokenizer.json or a sentencepiece tokenizer.model.

Special tokens written in a text ("</s>", "<image>") become those tokens wherever they stand, as in transformers. One thing
differs on purpose: a text that already begins with BOS does not get a second one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from .artifact import TokenizerFacts

PICTURE = -1  # stands for a picture in the ids of encode_with_images; never a token id

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BLANK = "▁"  # how sentencepiece vocabularies write a space
_WALL = "\ue000"  # a private-use character: no piece holds it, so nothing merges across it


class TokenizerError(ValueError):
    """Tokenizer files or a text that cannot be used; the message says why."""


class Vocabulary(Protocol):
    """What the two kinds of tokenizer files have in common."""

    @property
    def size(self) -> int:
        """Highest known id plus one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids, without a leading blank that stands for the start of the text; unknown ids give nothing."""
        ...

    def token(self, token_id: int) -> str | None: ...

    def token_id(self, token: str) -> int | None: ...

    def is_special(self, token_id: int) -> bool: ...


class TokenizersVocabulary:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is not a usable tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


class SentencePieceVocabulary:
    """A tokenizer.model of the Llama kind plus added tokens that it does not know.

    Control tokens (<s>, </s>, <unk>) and added tokens are cut out of the text first. The text then begins with a blank; after
    a special token a blank is added only with `legacy`, the behaviour of Llama tokenizers whose config says so.
    """

    def __init__(self, path: Path, added_tokens: Mapping[str, int], *, legacy: bool) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a usable sentencepiece model ({error})") from error
        self._legacy = legacy
        pieces = self._model.get_piece_size()
        control = (i for i in range(pieces) if self._model.is_control(i) or self._model.is_unknown(i))
        self._special = {self._model.id_to_piece(i): i for i in control} | dict(added_tokens)
        self._added = {i: token for token, i in added_tokens.items()}
        self._special_ids = set(self._special.values())
        self._size = 1 + max([pieces - 1, *self._added])
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._wall = self._model.encode(_WALL)

    @property
    def size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._cut.split(text)):
            if place % 2:
                ids.append(self._special[part])
            elif part:
                ids += self._encode_part(part, blank=place == 0 or self._legacy)
        return ids

    def _encode_part(self, part: str, *, blank: bool) -> list[int]:
        """Sentencepiece puts a blank before every text; behind a wall it does so before the wall."""
        return self._model.encode(part) if blank else self._model.encode(_WALL + part)[len(self._wall) :]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        shown = [i for i in ids if not (skip_special and i in self._special_ids)]
        text = _join_pieces(piece for i in shown if (piece := self.token(i)) is not None)
        return text.removeprefix(" ")

    def token(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id]
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._model.get_piece_size() else None

    def token_id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        found = self._model.piece_to_id(token)
        return None if self._model.is_unknown(found) else found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids


def _join_pieces(pieces: Iterable[str]) -> str:
    """Text of pieces; a run of byte pieces that is not UTF-8 gives one U+FFFD per byte, as tokenizers' ByteFallback does."""
    parts: list[str] = []
    run = bytearray()
    for piece in (*pieces, ""):
        if byte := _BYTE.fullmatch(piece):
            run.append(int(byte[1], 16))
            continue
        if run:
            parts.append(_utf8(bytes(run)))
            run.clear()
        parts.append(piece.replace(_BLANK, " "))
    return "".join(parts)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A vocabulary and the facts that say how the model uses it."""

    facts: TokenizerFacts
    vocabulary: Vocabulary

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of a text; with `add_bos` exactly one BOS comes first, also when the text begins with it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode ({error}); replace its lone surrogates") from error
        ids = self.vocabulary.encode(text)
        bos = self.facts.bos_token_id
        return [bos, *ids] if add_bos and ids[:1] != [bos] else ids

    def encode_with_images(self, text: str, mark: str) -> list[int]:
        """Ids of a prompt with PICTURE (-1) where a picture stands; BOS comes first if the checkpoint says so.

        hf: the mark is a token. original: the text is cut at the mark and each piece tokenised afresh, as LLaVA's
        tokenizer_image_token does, so that a piece begins with a blank like a text of its own.
        """
        add_bos = self.facts.add_bos
        if self.facts.style == "hf":
            ids = self.encode(text, add_bos=add_bos)
            return [PICTURE if i == self.facts.image_token_id else i for i in ids]
        first, *others = text.split(mark)
        ids = self.encode(first, add_bos=add_bos)
        for piece in others:
            ids += [PICTURE, *self.encode(piece, add_bos=False)]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids as transformers decodes it."""
        return self.vocabulary.decode(ids, skip_special=skip_special)

    def token(self, token_id: int) -> str:
        """How a token is written; empty for an unknown id."""
        return self.vocabulary.token(token_id) or ""


class Detokenizer:
    """Text piece by piece as tokens arrive; the pieces joined equal `Tokenizer.decode` of all ids.

    Text is held back while a later token could still change it: an unfinished character, and a run of byte tokens, whose
    characters all turn into U+FFFD when one byte of the run is wrong.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip_special = skip_special
        self._before: list[int] = []  # the last tokens given out: their text shows whether the next begins with a blank
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, maybe empty."""
        token = self._vocabulary.token(token_id)
        if token is None or (self._skip_special and self._vocabulary.is_special(token_id)):
            return ""
        self._held.append(token_id)
        if _BYTE.fullmatch(token):
            return ""
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._give_out(text)

    def finish(self) -> str:
        """What is still held back; afterwards the next token starts a new text."""
        text = self._new_text() if self._held else ""
        self._before, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._vocabulary.decode(self._before, skip_special=self._skip_special)
        return self._vocabulary.decode(self._before + self._held, skip_special=self._skip_special)[len(before) :]

    def _give_out(self, text: str) -> str:
        self._before, self._held = self._held, []
        return text


def read_vocabulary(path: Path, *, added_tokens: Mapping[str, int] | None = None, legacy: bool = False) -> Vocabulary:
    """Read tokenizer.json, or a sentencepiece model with tokens added; raises TokenizerError."""
    if not path.is_file():
        raise TokenizerError(f"{path} is missing; copy the whole artifact folder or compile again")
    if path.suffix == ".json":
        return TokenizersVocabulary(path)
    return SentencePieceVocabulary(path, added_tokens or {}, legacy=legacy)


def load_tokenizer(folder: Path, facts: TokenizerFacts) -> Tokenizer:
    """The tokenizer in `folder`, which holds the file that facts.kind names; raises TokenizerError."""
    name = "tokenizer.json" if facts.kind == "tokenizers" else "tokenizer.model"
    return Tokenizer(facts, read_vocabulary(folder / name, added_tokens=facts.added_tokens, legacy=facts.legacy))
