"""Vocabularies: text to ids and back, by a tokenizer.json or a sentencepiece tokenizer.model.

Special tokens written in a text ("</s>", "<image>") become those tokens wherever they stand, as in transformers, except those
that a `guard` breaks up (guards.py): they are words.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from .guards import any_of, new_guard, unguarded

MOST_TOKENS = 1 << 24  # of a vocabulary
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

_BLANK = "▁"  # how sentencepiece vocabularies write a space
_WALL = "\ue000"  # a private-use character: no piece holds it, so nothing merges across it


class TokenizerError(ValueError):
    """Tokenizer files or a text that cannot be used; the error says why."""


class Vocabulary(Protocol):
    """The interface of every kind of tokenizer file."""

    @property
    def size(self) -> int:
        """Highest known id plus one."""
        ...

    def encode(self, text: str, *, guard: str = "") -> list[int]:
        """Ids of the text alone: no BOS, no EOS. `guard` is taken out; a special token that it breaks up stays text."""
        ...

    def control_tokens(self) -> frozenset[str]:
        """The special tokens as they are written."""
        ...

    def added_tokens(self) -> frozenset[str]:
        """All tokens that are matched in a text before it is split: the special ones, and others that a file adds."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids, without a leading blank that stands for the start of the text; unknown ids give nothing."""
        ...

    def token(self, token_id: int) -> str | None:
        """The token as text; None for an unknown id."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a known token adds to a text before it."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token; None for an unknown one."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether decoding without special tokens leaves it out."""
        ...


class TokenizersVocabulary:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is not a usable tokenizer.json ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokens = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in tokens.items() if token.special}
        self._added = {i: token.content for i, token in tokens.items()}
        self._size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self._size > MOST_TOKENS:  # the library, and tables of ours, take room for every id up to the largest
            raise TokenizerError(f"{path} has a token with the id {self._size - 1}; expected less than {MOST_TOKENS}")
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    @property
    def size(self) -> int:
        """See Vocabulary.size."""
        return self._size

    def encode(self, text: str, *, guard: str = "") -> list[int]:
        """See Vocabulary.encode."""
        if guard and guard in text:
            return self._respelt.encode(text, guard)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _respelt(self) -> RespeltTokenizer:
        return RespeltTokenizer(self._tokenizer)

    def control_tokens(self) -> frozenset[str]:
        """See Vocabulary.control_tokens."""
        return frozenset(self._added[i] for i in self._special)

    def added_tokens(self) -> frozenset[str]:
        """See Vocabulary.added_tokens."""
        return frozenset(self._added.values())

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See Vocabulary.decode."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, token_id: int) -> str | None:
        """See Vocabulary.token."""
        return self._tokenizer.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary.token_bytes."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.token(token_id) or ""
        return bytes(_BYTE_OF[letter] for letter in token) if self._byte_level else _piece_bytes(token)

    def token_id(self, token: str) -> int | None:
        """See Vocabulary.token_id."""
        return self._tokenizer.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """See Vocabulary.is_special."""
        return token_id in self._special


class RespeltTokenizer:
    """A tokenizer.json whose added tokens are spelt as no text can spell them, so that their usual spelling is words.

    Everything else about a special token stays as the file has it: blanks that it takes, and what a text after it begins with.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        data = json.loads(tokenizer.to_str())
        self._prefix = new_guard()
        ids = {}
        for token in data["added_tokens"]:
            ids[token["content"]] = token["id"]
            token["content"] = self._prefix + token["content"]
        data["post_processor"] = None
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        # A token that the file's vocabulary has too gets a new id when it is spelt anew.
        self._ids = {self._tokenizer.token_to_id(self._prefix + token): token_id for token, token_id in ids.items()}
        self._cut = re.compile(f"({any_of(ids)})")

    def encode(self, text: str, guard: str) -> list[int]:
        """Ids of a text; the added tokens that `guard` breaks up are words."""
        parts = self._cut.split(text)
        parts[1::2] = [self._prefix + token for token in parts[1::2]]
        ids = self._tokenizer.encode(unguarded("".join(parts), guard), add_special_tokens=False).ids
        return [self._ids.get(i, i) for i in ids]


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
        self._cut = re.compile(f"({any_of(self._special)})")
        self._wall = self._model.encode(_WALL)

    @property
    def size(self) -> int:
        """See Vocabulary.size."""
        return self._size

    def encode(self, text: str, *, guard: str = "") -> list[int]:
        """See Vocabulary.encode."""
        ids: list[int] = []
        for place, part in enumerate(self._cut.split(text)):
            if place % 2:
                ids.append(self._special[part])
            elif part := unguarded(part, guard):
                ids += self._encode_part(part, blank=place == 0 or self._legacy)
        return ids

    def control_tokens(self) -> frozenset[str]:
        """See Vocabulary.control_tokens."""
        return frozenset(self._special)

    added_tokens = control_tokens

    def _encode_part(self, part: str, *, blank: bool) -> list[int]:
        """Ids of a text without special tokens. Sentencepiece puts a blank before it; a wall in front takes the blank."""
        return self._model.encode(part) if blank else self._model.encode(_WALL + part)[len(self._wall) :]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See Vocabulary.decode."""
        visible = [i for i in ids if not (skip_special and i in self._special_ids)]
        text = _join_pieces(piece for i in visible if (piece := self.token(i)) is not None)
        return text.removeprefix(" ")

    def token(self, token_id: int) -> str | None:
        """See Vocabulary.token."""
        if token_id in self._added:
            return self._added[token_id]
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._model.get_piece_size() else None

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary.token_bytes."""
        token = self._added.get(token_id)
        return _piece_bytes(self.token(token_id) or "") if token is None else token.encode()

    def token_id(self, token: str) -> int | None:
        """See Vocabulary.token_id."""
        if token in self._special:
            return self._special[token]
        token_id = self._model.piece_to_id(token)
        return None if self._model.is_unknown(token_id) else token_id

    def is_special(self, token_id: int) -> bool:
        """See Vocabulary.is_special."""
        return token_id in self._special_ids


def _join_pieces(pieces: Iterable[str]) -> str:
    """Text of pieces; a run of byte pieces that is not UTF-8 gives one U+FFFD per byte, as tokenizers' ByteFallback does."""
    parts: list[str] = []
    run = bytearray()
    for piece in (*pieces, ""):
        if byte := BYTE_PIECE.fullmatch(piece):
            run.append(int(byte[1], 16))
            continue
        if run:
            parts.append(_utf8(bytes(run)))
            run.clear()
        parts.append(piece.replace(_BLANK, " "))
    return "".join(parts)


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece piece."""
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_BLANK, " ").encode()


def _letters() -> dict[str, int]:
    """The letters by which byte-level vocabularies write bytes: printable ones of Latin-1 themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _letters()


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(data)
