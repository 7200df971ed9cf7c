"""Text to token ids and back, in one go and token by token.

One thing differs from transformers on purpose: a text that already begins with BOS does not get a second one.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact import TokenizerConfig
from ..heap import release_freed
from .tiktoken_vocabulary import TiktokenVocabulary
from .vocabularies import BYTE_PIECE, SentencePieceVocabulary, TokenizerError, TokenizersVocabulary, Vocabulary

__all__ = [
    "IMAGE_ID",
    "Detokenizer",
    "Tokenizer",
    "TokenizerError",
    "Vocabulary",
    "check_unicode",
    "load_tokenizer",
    "read_vocabulary",
]

IMAGE_ID = -1  # stands for an image in the ids of encode_with_images; never the id of a token


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A vocabulary, and the settings that say how the model uses it."""

    config: TokenizerConfig
    vocabulary: Vocabulary

    def encode(self, text: str, *, add_bos: bool, guard: str = "") -> list[int]:
        """Ids of a text; with `add_bos` exactly one BOS comes first, also when the text begins with it.

        `guard` is taken out; a special token that it breaks up is words (guards.py).
        """
        check_unicode(text)
        ids = self.vocabulary.encode(text, guard=guard)
        bos = self.config.bos_token_id
        return [bos, *ids] if add_bos and ids[:1] != [bos] else ids

    def encode_with_images(self, text: str, mark: str, guard: str = "") -> list[int]:
        """Ids of a prompt with IMAGE_ID (-1) where an image stands; BOS comes first if the checkpoint says so.

        hf: the mark is a token. original: the text is cut at the mark and each piece tokenised afresh, as LLaVA's
        tokenizer_image_token does, so that a piece begins with a blank like a text of its own.
        """
        add_bos = self.config.add_bos
        if self.config.style == "hf":
            ids = self.encode(text, add_bos=add_bos, guard=guard)
            return [IMAGE_ID if i == self.config.image_token_id else i for i in ids]
        first, *others = text.split(mark)
        ids = self.encode(first, add_bos=add_bos, guard=guard)
        for piece in others:
            ids += [IMAGE_ID, *self.encode(piece, add_bos=False, guard=guard)]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids as transformers decodes it."""
        return self.vocabulary.decode(ids, skip_special=skip_special)

    def token(self, token_id: int) -> str:
        """The token as text; empty for an unknown id."""
        return self.vocabulary.token(token_id) or ""


def control_tokens(tokenizer: Tokenizer, template: str, mark: str, eos: Sequence[int]) -> frozenset[str]:
    """The tokens that words of a conversation must not become: the special ones, the mark of an image, BOS, those that end an
    answer, and added tokens that the template writes though they are not marked as special."""
    others = (mark, *(tokenizer.token(i) for i in (tokenizer.config.bos_token_id, *eos)))
    vocabulary = tokenizer.vocabulary
    in_template = (token for token in vocabulary.added_tokens() if token in template)
    return frozenset(token for token in (*vocabulary.control_tokens(), *in_template, *others) if token)


def check_unicode(text: str) -> None:
    """Raise TokenizerError for a text with lone surrogates, which has no bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"the text is not valid Unicode ({error}); replace its lone surrogates") from error


class Detokenizer:
    """Text piece by piece as tokens arrive; the pieces joined equal `Tokenizer.decode` of all ids, but for the very end.

    Text is held back while a later token could still change it: an unfinished character, and a run of byte tokens, whose
    characters all turn into U+FFFD when one byte of the run is wrong.

    Tokens that end inside a character (an answer that was cut) give all characters that are complete, and one U+FFFD for the
    one that is not, whatever the vocabulary. transformers does so for vocabularies of bytes; of a run of byte tokens it would
    leave nothing but U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip_special = skip_special
        self._before: list[int] = []  # the last tokens given out: their text shows whether the next begins with a blank
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that is certain with this token, perhaps empty."""
        token = self._vocabulary.token(token_id)
        if token is None or (self._skip_special and self._vocabulary.is_special(token_id)):
            return ""
        self._pending.append(token_id)
        if self._is_byte(token_id, token):
            return ""
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._emit(text)

    def finish(self) -> str:
        """The text that is still held back; afterwards the next token starts a new text."""
        cut = self._unfinished()
        self._pending = self._pending[: len(self._pending) - cut]
        text = (self._new_text() if self._pending else "") + "\ufffd" * (cut > 0)
        self._before, self._pending = [], []
        return text

    def _is_byte(self, token_id: int, token: str) -> bool:
        """Whether a token of a vocabulary of pieces stands for one byte."""
        return BYTE_PIECE.fullmatch(token) is not None and len(self._vocabulary.token_bytes(token_id)) == 1

    def _unfinished(self) -> int:
        """The number of byte tokens at the end that are a prefix of a character."""
        last = self._pending[-3:]
        is_byte = [self._is_byte(token_id, self._vocabulary.token(token_id) or "") for token_id in last]
        for start in range(len(last)):
            if all(is_byte[start:]) and _is_prefix_of_character(b"".join(map(self._vocabulary.token_bytes, last[start:]))):
                return len(last) - start
        return 0

    def _new_text(self) -> str:
        before = self._vocabulary.decode(self._before, skip_special=self._skip_special)
        return self._vocabulary.decode(self._before + self._pending, skip_special=self._skip_special)[len(before) :]

    def _emit(self, text: str) -> str:
        self._before, self._pending = self._pending, []
        return text


def _is_prefix_of_character(data: bytes) -> bool:
    """Whether bytes are a proper prefix of a character in UTF-8."""
    if data[:1] == b"\xed" and data[1:2] >= b"\xa0":  # of a surrogate, which is no character; Python's decoder waits for it
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return not decoder.decode(data) and len(decoder.getstate()[0]) == len(data)
    except UnicodeDecodeError:
        return False


def read_vocabulary(path: Path, *, added_tokens: Mapping[str, int] | None = None, legacy: bool = False) -> Vocabulary:
    """Read tokenizer.json, or a sentencepiece model with tokens added; raises TokenizerError."""
    _check_there(path)
    if path.suffix == ".json":
        return TokenizersVocabulary(path)
    return SentencePieceVocabulary(path, added_tokens or {}, legacy=legacy)


def load_tokenizer(folder: Path, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer in `folder`, which holds the file that config.kind names; raises TokenizerError."""
    vocabulary = _vocabulary(folder, config)
    release_freed()  # reading a vocabulary takes several times what it holds
    return Tokenizer(config, vocabulary)


def _vocabulary(folder: Path, config: TokenizerConfig) -> Vocabulary:
    if config.kind == "tiktoken":
        path = folder / config.file
        _check_there(path)
        return TiktokenVocabulary(path, config.added_tokens, pattern=config.pattern, nfc=config.nfc)
    name = "tokenizer.json" if config.kind == "tokenizers" else "tokenizer.model"
    return read_vocabulary(folder / name, added_tokens=config.added_tokens, legacy=config.legacy)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise TokenizerError(f"{path} is missing; copy the whole artifact folder or compile again")
