"""The bytes that each token adds to an answer, in which bad words are sought and grammars matched."""

from __future__ import annotations

import numpy as np

from .tokenizer import Tokenizer


class TokenBytes:
    """The bytes of every token: `tokens[id]`. Hidden tokens, such as the end of the sequence, have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocabulary
        ids = range(tokenizer.config.used)
        self.hidden = [i for i in ids if vocabulary.is_special(i) or vocabulary.token(i) is None]
        nothing = set(self.hidden)
        self.tokens = [b"" if i in nothing else vocabulary.token_bytes(i) for i in ids]
        self._completing: dict[tuple[bytes, int], list[int]] = {}

    def completing(self, text: bytes, length: int) -> list[int]:
        """The tokens that complete `text` in an answer that ends with its first `length` bytes."""
        key = text, length
        if key not in self._completing:
            prefix = text[:length]
            self._completing[key] = [i for i, token in enumerate(self.tokens) if text in prefix + token]
        return self._completing[key]


class BadWords:
    """A constraint: texts that must not be in an answer, whatever tokens spell them (see logits_processors.Constraint)."""

    done = False

    def __init__(self, words: tuple[str, ...], table: TokenBytes) -> None:
        self.table = table
        self.lengths = {word.encode(): 0 for word in words}  # bytes of the longest prefix of each that ends the answer

    def forbid(self, row: np.ndarray) -> None:
        """Forbid the tokens that would complete a word; `row` are logits, float [V]."""
        for word, length in self.lengths.items():
            row[self.table.completing(word, length)] = -float("inf")

    def accept(self, token: int) -> None:
        """Note a token of the answer."""
        data = self.table.tokens[token] if token < len(self.table.tokens) else b""
        for word, length in self.lengths.items():
            text = word[:length] + data
            longest = min(len(word) - 1, len(text))
            self.lengths[word] = next(n for n in range(longest, -1, -1) if text.endswith(word[:n]))
