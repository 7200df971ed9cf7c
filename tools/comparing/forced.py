"""Forced answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...runtime.engine.paged_cache import PagedCache
from ...runtime.engine.request import Sequence
from ...runtime.engine.text_cache import TextCache


@dataclass(slots=True, eq=False)
class ForcedAnswer:
    """A token source (runtime.engine.request.TokenSource): it gives these tokens, whatever the logits are."""

    tokens: np.ndarray
    cache: TextCache
    slot: int = -1  # of the sequence, once it answers
    pages: list[int] = field(default_factory=list)  # of the sequence, where the text is in pages

    def __call__(self, sequence: Sequence) -> int:
        self.slot = sequence.held_slot
        if isinstance(self.cache, PagedCache):
            self.pages = self.cache.pages_of(self.slot)
        return int(self.tokens[len(sequence.generated)])
