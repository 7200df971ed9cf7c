"""Published figures of Ascend cards, for a lower bound of the cost of a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """One device as a process sees it: 16-bit matrix products per second, memory bandwidth and size."""

    name: str
    flops: float  # floating-point operations per second, float16
    bandwidth: float  # bytes per second
    memory: float  # bytes

    def bound_ms(self, flops: int, nbytes: int) -> float:
        """A lower bound of a run in milliseconds: the larger of the times of arithmetic and memory (roofline, Williams et al.
        2009)."""
        return 1e3 * max(flops / self.flops, nbytes / self.bandwidth)

    def limit(self, flops: int, nbytes: int) -> str:
        return "arithmetic" if flops / self.flops > nbytes / self.bandwidth else "memory"


CARDS = {
    "910B": Card("Ascend 910B class (Atlas 800T/800I A2)", flops=350e12, bandwidth=1.6e12, memory=64e9),
    "310P": Card("one of the two chips of an Atlas 300I DUO", flops=70e12, bandwidth=204e9, memory=48e9),
}
