"""The measures: each is one command to a contestant, and the unit of its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .sizes import Size

FIRST_TOKEN = 3  # ids below are special


@dataclass(frozen=True, slots=True)
class Measure:
    """`amount` units in the seconds of one command; 0: the seconds themselves count."""

    name: str
    unit: str
    command: dict[str, Any]
    amount: float = 0

    def figure(self, seconds: float) -> float:
        return self.amount / seconds if self.amount else seconds


def tokens(count: int, seed: int, vocab: int) -> list[int]:
    """A random prompt, the same for all."""
    return np.random.default_rng(seed).integers(FIRST_TOKEN, vocab, count).tolist()


def measures(size: Size, vocab: int, side: int) -> tuple[Measure, ...]:
    """`vocab`: entries of the vocabulary; `side`: of an image, in pixels."""

    def prompts(length: int, count: int = 1) -> list[list[int]]:
        return [tokens(length, seed, vocab) for seed in range(count)]

    def decode(length: int, batch: int) -> dict[str, Any]:
        return {"do": "decode", "prompts": prompts(length, batch)}

    (long,), (text,) = prompts(size.prompt), prompts(size.text)
    return (
        Measure(f"prefill {size.prompt}", "tokens/s", {"do": "prefill", "tokens": long}, size.prompt),
        Measure(f"decode after {size.short}", "tokens/s", decode(size.short, 1), 1),
        Measure(f"decode after {size.long}", "tokens/s", decode(size.long, 1), 1),
        Measure(f"decode, batch {size.batch}", "tokens/s", decode(size.short, size.batch), size.batch),
        Measure("image encoded", "1/s", {"do": "image", "side": side}, 1),
        Measure(f"first token, image and {size.text}", "s", {"do": "image_prompt", "side": side, "tokens": text}),
    )
