"""Tokens that a checkpoint never lets an answer have: what its generation_config.json forbids, for every request."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from ..artifact import SamplingDefaults
from ..processor.prompt import Prompt


def bans_of(defaults: SamplingDefaults, prompt: Prompt, vocab: int) -> tuple[Bans, ...]:
    """The constraint for a checkpoint's bans; none where it has none."""
    if not (defaults.bad_words_ids or defaults.suppress_tokens or defaults.begin_suppress_tokens):
        return ()
    return (Bans(defaults, np.where(prompt.rows < 0, prompt.token_ids, -1), vocab),)


class Bans:
    """A constraint on one answer (see logits_processors.Constraint).

    As in transformers: suppress_tokens never come, begin_suppress_tokens not as the first token, and a sequence of
    bad_words_ids is never completed, even where it starts in the prompt.
    """

    def __init__(self, defaults: SamplingDefaults, tokens: Iterable[int], vocab: int) -> None:
        """`tokens`: ids of the prompt, -1 where an image stands. Ids from `vocab` on have no logit."""
        words = [word for word in defaults.bad_words_ids or () if word[-1] < vocab]
        self._longer = [(word[:-1], word[-1]) for word in words if word[1:]]
        single = (word[0] for word in words if not word[1:])
        self._never = _ids((*(defaults.suppress_tokens or ()), *single), vocab)
        self._first = _ids(defaults.begin_suppress_tokens or (), vocab)
        self._last = deque(map(int, tokens), maxlen=max((len(prefix) for prefix, _ in self._longer), default=0))
        self._begun = False
        self.done = False

    def forbid(self, row: np.ndarray) -> None:
        row[self._never] = -np.inf
        if not self._begun:
            row[self._first] = -np.inf
        last = tuple(self._last)
        for prefix, token in self._longer:
            if last[-len(prefix) :] == prefix:
                row[token] = -np.inf

    def accept(self, token: int) -> None:
        self._begun = True
        self._last.append(token)


def _ids(tokens: Iterable[int], vocab: int) -> np.ndarray:
    return np.array(sorted({token for token in tokens if token < vocab}), np.int64)
