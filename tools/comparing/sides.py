"""The interface of a side of a comparison, whatever computes it."""

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

HIDDEN_TOKEN = -1  # the compared token id of positions that are an image's rows


class SideError(ValueError):
    """A side that cannot be opened or compared; the message says what to do."""


class Prepared(Protocol):
    """A prompt as one side has prepared it."""

    @property
    def length(self) -> int: ...

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs that the host has made of the prompt, by names that are the same on both sides; see inputs.py."""
        ...

    def with_tokens(self, length: int, ids: np.ndarray) -> Prepared:
        """The prompt cut to its first `length` positions, or extended to them by the first of `ids`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """The outputs of a side for forced tokens."""

    logits: np.ndarray  # float32 [n, V]: before each forced token
    caches: dict[str, np.ndarray] = field(default_factory=dict)  # k_cache.N, v_cache.N [K, positions, D]


class Side(Protocol):
    """One side of a comparison: reference or candidate."""

    name: str
    info: ModelInfo
    processor: Processor

    @property
    def config(self) -> ModelConfig | None:
        """Sizes of the model; None for an artifact that does not hold them."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of a compiled artifact; None for a checkpoint."""
        ...

    def prepare(self, sample: Sample) -> Prepared: ...

    def run_forced(
        self,
        prompts: Sequence[Prepared],
        answers: Sequence[np.ndarray],
        *,
        route: dict[str, int] | None = None,
        caches: bool = False,
    ) -> list[Generated]:
        """Teacher-forced: the logits before each token of the answers, all prompts running together.

        `route`: the one bucket to use of these kinds. `caches`: with the cache's contents at the end.
        """
        ...

    def greedy(self, prompt: Prepared, count: int) -> np.ndarray:
        """The tokens of greedy decoding, int64 [n <= count], the end of the answer included."""
        ...

    def boxes(self, text: str, prompt: Prepared) -> Sequence[Box]:
        """The boxes in an answer."""
        ...

    def close(self) -> None: ...


def answer_text(side: Side, tokens: np.ndarray) -> str:
    return side.processor.decode([int(t) for t in tokens]).strip()
