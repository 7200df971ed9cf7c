"""What each token adds to an answer, as bytes: what texts are looked for and grammars are matched in."""

from __future__ import annotations

from .tokenizer import Tokenizer


class TokenBytes:
    """The bytes of every token that may be in an answer; of hidden ones, such as the end of the sequence, none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocabulary
        ids = range(tokenizer.config.used)
        self.hidden = [i for i in ids if vocabulary.is_special(i) or vocabulary.token(i) is None]
        nothing = set(self.hidden)
        self.tokens = [b"" if i in nothing else vocabulary.token_bytes(i) for i in ids]
        self._completing: dict[tuple[bytes, int], list[int]] = {}

    def completing(self, text: bytes, held: int) -> list[int]:
        """The tokens that complete `text` in an answer that ends with its first `held` bytes."""
        key = text, held
        if key not in self._completing:
            before = text[:held]
            self._completing[key] = [i for i, token in enumerate(self.tokens) if text in before + token]
        return self._completing[key]


class BadWords:
    """Texts that must not be in an answer, in whatever tokens they are written; see logit_rules.Guide."""

    done = False

    def __init__(self, words: tuple[str, ...], table: TokenBytes) -> None:
        self.table = table
        self.held = {word.encode(): 0 for word in words}  # how much of each the answer ends with

    def forbid(self, row) -> None:
        for word, held in self.held.items():
            row[self.table.completing(word, held)] = -float("inf")

    def accept(self, token: int) -> None:
        added = self.table.tokens[token] if token < len(self.table.tokens) else b""
        for word, held in self.held.items():
            text = word[:held] + added
            longest = min(len(word) - 1, len(text))
            self.held[word] = next(n for n in range(longest, -1, -1) if text.endswith(word[:n]))
