"""Forced answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...runtime.engine.request import Sequence


@dataclass(slots=True, eq=False)
class ForcedAnswer:
    """A token source (runtime.engine.request.TokenSource): it gives these tokens, whatever the logits are."""

    tokens: np.ndarray
    slot: int = -1  # of the sequence, once it answers

    def __call__(self, sequence: Sequence) -> int:
        self.slot = sequence.held_slot
        return int(self.tokens[len(sequence.generated)])
