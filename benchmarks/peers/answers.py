"""Whether contestants compute the same function: logits after one prompt against transformers in float32.

A contestant must not be fast at a different computation. A distance is the length of the difference of the logits divided by
the length of the reference's. Rounding weights to few bits shows in it; a missing layer or wrong rotary tables give about 1.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .contestants import OURS, Contestant

REFERENCE = Contestant("transformers float32", "hf", "float32", 6.0, 0.0, OURS)


@dataclass(frozen=True, slots=True)
class Answer:
    """One contestant's logits against the reference's."""

    distance: float
    same_token: bool  # whether the top-1 token is the same
    tolerance: float

    @property
    def right(self) -> bool:
        return self.distance <= self.tolerance


def compare(file: Path, reference: Path, tolerance: float) -> Answer:
    """Logits [V] in two .npy files; a vocabulary that was filled up is cut to the shorter one."""
    logits, expected = np.load(file), np.load(reference)
    entries = min(len(logits), len(expected))
    logits, expected = logits[:entries], expected[:entries]
    distance = float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))
    return Answer(round(distance, 9), bool(logits.argmax() == expected.argmax()), tolerance)
