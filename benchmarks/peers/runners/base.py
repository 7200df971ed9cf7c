"""The interface of a contestant, and what is timed of it.

The peers' environment imports this module too. It has numpy and nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

Tokens = Sequence[int]
# https://huggingface.co/openai/clip-vit-large-patch14-336, preprocessor_config.json
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class UnsupportedError(Exception):
    """This contestant does not support the command; the message gives the reason."""


class Runner(Protocol):
    """One library that has the model open, made by OPEN(checkpoint, home, setting, size, threads).

    Every prompt begins with an empty cache; V entries of the vocabulary.
    """

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        """Compute prompts of one length, up to the logits of their last tokens."""
        ...

    def step(self) -> None:
        """One more token for every prompt, the top-1 token."""
        ...

    def last(self) -> np.ndarray:
        """Logits, float32 [V], after the first prompt as far as it was computed."""
        ...

    def image(self, pixels: np.ndarray) -> None:
        """An image, uint8 [S, S, 3], to the rows that the decoder takes."""
        ...

    def prefill_image(self, pixels: np.ndarray, prompt: Tokens) -> None:
        """An image and the text after it, up to the logits of the last token."""
        ...


def normalised(pixels: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3] -> float32 [1, 3, S, S] as CLIP expects them, where the model does not do that itself."""
    scaled = (pixels.astype(np.float32) / 255 - MEAN) / STD
    return scaled.transpose(2, 0, 1)[None]


class TextRunner:
    """A runner without images."""

    def image(self, pixels: np.ndarray) -> None:
        raise UnsupportedError("runs text only here")

    def prefill_image(self, pixels: np.ndarray, prompt: Tokens) -> None:
        raise UnsupportedError("runs text only here")
