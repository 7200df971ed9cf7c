"""Tokenizer files in tiktoken's form, small or of a published model's size, for tests."""

from __future__ import annotations

import base64
import inspect
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

TEXTS = (
    "What is in the picture? A red circle and a blue square. What is the largest one? It is the red circle.",
    "The quick brown fox jumps over the lazy dog; 1234567890 times, it says. (Really?) Yes - why not?",
    "图中的狗是什么品种？ 图片里有一只狗和两只猫。",
    "ひらがなとカタカナ 한국어 문장 Ελληνικά русский текст",
    "😀👩‍👩‍👧 emoji  with   blanks\n\n\tand\r\nlines 12345 67 it's I'LL we've",
)


# How Llama-3 cuts text into words, as transformers has it.
WORDS: str = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default


@cache
def trained() -> tuple[bytes, ...]:
    """The tokens, in the order of their ranks, of a byte-level BPE trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    to_byte = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return tuple(bytes(to_byte[letter] for letter in token) for token, _ in vocabulary)


def filler(count: int) -> Iterator[bytes]:
    """As many tokens as a published file has: all bytes, then strings that no text of a test holds."""
    singles = (bytes([i]) for i in range(256))
    triples = (bytes(three) for three in itertools.product(range(0xC0, 0x100), repeat=3))
    return itertools.islice(itertools.chain(singles, triples), count)


def write_ranks(path: Path, tokens: Iterable[bytes], *, end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d" % rank + end for rank, token in enumerate(tokens)))
    return path


def as_tokenizer_json(path: Path, specials: Iterable[str]) -> Tokenizer:
    """transformers' conversion of Llama-3's tiktoken file to a tokenizer.json; `specials` follow the ranks."""
    converter = TikTokenConverter(vocab_file=str(path), extra_special_tokens=list(specials))
    tokenizer = converter.converted()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
