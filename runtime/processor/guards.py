"""Guards: words that spell a special token stay words, from the message through the template to the tokenizer.

A guard is a run of private-use characters. It is put into every special token that a text spells, right after the first
character, so neither a template nor a tokenizer sees that token; the tokenizer takes it out again and encodes words.
Guards are drawn at random for each rendering: whatever private-use characters a text holds, it cannot hold the guard.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

_PRIVATE = [chr(code) for code in range(0xE000, 0xF900)]
_LENGTH = 8  # characters of a guard: one of 6400 ** 8


def new_guard() -> str:
    """A new run of random private-use characters."""
    return "".join(secrets.choice(_PRIVATE) for _ in range(_LENGTH))


def any_of(tokens: Iterable[str]) -> str:
    """A regular expression for any of the tokens, the longest first; without tokens it matches nothing."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def unguarded(text: str, guard: str) -> str:
    """The text without the guard; as it is where the guard is empty."""
    return text.replace(guard, "") if guard else text


class Guard:
    """A run of random characters, `mark`, that is put into the special tokens which texts spell, so that they stay words."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.mark = new_guard()
        self._tokens = tuple(token for token in tokens if token)
        self._longest = max(map(len, self._tokens), default=0)
        self._any = re.compile(any_of(self._tokens))

    def words(self, text: str) -> str:
        """The text, broken up where a token begins, or where one could begin that the next text completes."""
        cuts = [0, *(place + 1 for place in sorted({*self._begins(text), *self._open_ends(text)})), None]
        return self.mark.join(text[start:end] for start, end in pairwise(cuts))

    def _begins(self, text: str) -> Iterator[int]:
        """Where tokens begin, also inside one another."""
        match = self._any.search(text)
        while match:
            yield match.start()
            match = self._any.search(text, match.start() + 1)

    def _open_ends(self, text: str) -> list[int]:
        """Where a prefix of a token starts that ends the text, blanks at the end aside: a template may strip them."""
        end = len(text.rstrip())
        starts = range(max(0, end - self._longest + 1), end)
        return [start for start in starts if any(token.startswith(text[start:end]) for token in self._tokens)]
