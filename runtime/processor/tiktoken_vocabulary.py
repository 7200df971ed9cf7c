"""A vocabulary in tiktoken's form: lines "base64 of a token's bytes, blank, rank", and special tokens that the file lacks.

Qwen's qwen.tiktoken and Llama-3's tokenizer.model have this form. Tokens are bytes: one may end inside a character.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import tiktoken

from ..shown import quoted
from .guards import any_of, unguarded
from .vocabularies import TokenizerError

# Qwen-VL's tags mark the objects of an answer: they are text to a reader, though special to the tokenizer.
TAGS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"))

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)\r?")


class TiktokenVocabulary:
    """Ranks from a file plus special tokens; `visible` are those that decoding keeps when it skips the others.

    pattern: cuts text into words, which tokens never cross. nfc: text is brought into Unicode's normal form C first.
    Raises TokenizerError for a damaged file.
    """

    def __init__(
        self, path: Path, added_tokens: Mapping[str, int], *, pattern: str, nfc: bool, visible: Collection[str] = TAGS
    ) -> None:
        ranks = read_ranks(path)
        if conflicts := {token: i for token, i in added_tokens.items() if i < len(ranks)}:
            raise TokenizerError(
                f"{path} has {len(ranks)} tokens, so that {conflicts} are taken; take the file that belongs to these special "
                "tokens"
            )
        try:
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(added_tokens)
            )
        except ValueError as error:
            raise TokenizerError(f"the pattern {quoted(pattern)} for {path} is not a regular expression ({error})") from error
        self._nfc = nfc
        self._special = dict(added_tokens)
        self._hidden = {i for token, i in added_tokens.items() if token not in visible}
        self._bytes = {i: token for token, i in ranks.items()} | {i: token.encode() for token, i in added_tokens.items()}

    @property
    def size(self) -> int:
        """See Vocabulary.size."""
        return 1 + max(self._bytes)

    def encode(self, text: str, *, guard: str = "", specials: Collection[str] | None = None) -> list[int]:
        """Ids of a text; of the special tokens written in it only those in `specials` (default: all) are recognised, and none
        that `guard` breaks up, which is taken out."""
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        allowed = set(self._special if specials is None else specials)
        if not guard or guard not in text:
            return self._encode(text, allowed)
        ids: list[int] = []
        for place, part in enumerate(re.split(f"({any_of(allowed)})", text)):
            ids += [self._special[part]] if place % 2 else self._encode(unguarded(part, guard), set())
        return ids

    def _encode(self, text: str, allowed: set[str]) -> list[int]:
        try:
            return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        except ValueError as error:
            raise TokenizerError(f"the text cannot be cut into words ({error}); shorten its longest run of blanks") from error

    def control_tokens(self) -> frozenset[str]:
        """See Vocabulary.control_tokens."""
        return frozenset(self._special)

    added_tokens = control_tokens

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        visible = (i for i in ids if not (skip_special and i in self._hidden))
        return b"".join(self._bytes.get(i, b"") for i in visible).decode("utf-8", errors="replace")

    def token(self, token_id: int) -> str | None:
        """See Vocabulary.token; bytes that are no UTF-8 become U+FFFD."""
        data = self._bytes.get(token_id)
        return None if data is None else data.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See Vocabulary.token_bytes."""
        return self._bytes[token_id]

    def token_id(self, token: str) -> int | None:
        """The id of a special token, or of a text that is one token; None for any other."""
        if token in self._special:
            return self._special[token]
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def is_special(self, token_id: int) -> bool:
        """Whether decoding without special tokens leaves it out."""
        return token_id in self._hidden


def is_tiktoken(path: Path) -> bool:
    """Whether a file has this form; a tokenizer.model may be a sentencepiece model as well."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096).rstrip(b"\n")) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks; raises TokenizerError unless the ranks are 0, 1, 2, ... and every byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _read_line(line, f"{path}, line {number}")
        if rank != len(ranks) or token in ranks:
            raise TokenizerError(
                f"{path}, line {number}: {quoted(token)} has rank {rank}; expected a new token of rank {len(ranks)}: "
                "fetch the file again"
            )
        ranks[token] = rank
    missing = sum(bytes([i]) not in ranks for i in range(256))
    if missing:
        raise TokenizerError(f"{path} lacks {missing} of the 256 single bytes; fetch the file again")
    return ranks


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    match = _LINE.fullmatch(line)
    try:
        if match is None:
            raise binascii.Error
        return base64.b64decode(match[1], validate=True), int(match[2])
    except binascii.Error:
        raise TokenizerError(
            f"{where} is {quoted(line[:40])}; expected base64, a blank and a rank: fetch the file again"
        ) from None
