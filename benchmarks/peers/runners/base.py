"""What a contestant can do, and what is timed of it.

Imported by the environment of the peers too, which has numpy but nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Tokens = Sequence[int]


class UnsupportedError(Exception):
    """This contestant cannot do what was asked; the message says why."""


class Runner(Protocol):
    """One library that has the model open. Every prompt begins with an empty cache; V entries of the vocabulary."""

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        """Compute prompts of one length, up to the logits of their last tokens."""
        ...

    def step(self) -> None:
        """One more token for every prompt, the likeliest one."""
        ...

    def logits(self, prompt: Tokens) -> np.ndarray:
        """float32 [V] behind a prompt."""
        ...

    def image(self, pixels: np.ndarray) -> None:
        """A picture, uint8 [S, S, 3], to the rows that the decoder takes."""
        ...

    def prefill_picture(self, pixels: np.ndarray, prompt: Tokens) -> None:
        """A picture and the text behind it, up to the logits of the last token."""
        ...


class TextRunner:
    """A runner without pictures."""

    def image(self, pixels: np.ndarray) -> None:
        raise UnsupportedError("runs text only here")

    def prefill_picture(self, pixels: np.ndarray, prompt: Tokens) -> None:
        raise UnsupportedError("runs text only here")
