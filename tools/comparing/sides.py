"""What a side of a comparison can do, whoever computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...model_defs.config import ModelConfig
from ...runtime.artifact import Manifest, ModelInfo
from ...runtime.processor.boxes import Box
from ...runtime.processor.processor import Processor
from .samples import Sample

HIDDEN_TOKEN = -1  # stands in compared token ids where an image's rows do


class SideError(ValueError):
    """A side that cannot be opened or compared; the message says what to do."""


class Prepared(Protocol):
    """A prompt as one side has prepared it."""

    @property
    def length(self) -> int: ...

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """What the host has made of the prompt, by names that sides share where they have the same; see inputs.py."""
        ...

    def with_tokens(self, length: int, ids: np.ndarray) -> Prepared:
        """The first `length` positions; behind the last, `ids` from their beginning."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """What a side says to forced tokens."""

    logits: np.ndarray  # float32 [n, V]: before each forced token
    caches: dict[str, np.ndarray] = field(default_factory=dict)  # k_cache.N, v_cache.N [K, positions, D]


class Side(Protocol):
    """Reference or candidate."""

    name: str
    info: ModelInfo
    processor: Processor

    @property
    def config(self) -> ModelConfig | None:
        """Sizes of the model; None for an artifact that does not hold them."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """Of a compiled artifact."""
        ...

    def prepare(self, sample: Sample) -> Prepared: ...

    def say(
        self,
        prompts: Sequence[Prepared],
        answers: Sequence[np.ndarray],
        *,
        route: dict[str, int] | None = None,
        caches: bool = False,
    ) -> list[Generated]:
        """Teacher-forced: the logits before each token of the answers, all prompts running together.

        `route`: use no other bucket of these kinds. `caches`: also what the cache then holds.
        """
        ...

    def greedy(self, prompt: Prepared, count: int) -> np.ndarray:
        """The tokens that the side says by itself, int64 [n <= count], the end of the answer included."""
        ...

    def boxes(self, text: str, prompt: Prepared) -> Sequence[Box]:
        """Boxes in an answer."""
        ...

    def close(self) -> None: ...


def answer_text(side: Side, tokens: np.ndarray) -> str:
    return side.processor.decode([int(t) for t in tokens]).strip()
