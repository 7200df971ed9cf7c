"""Published figures of Ascend cards, to say what a graph could cost there at best."""

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
        """No run is faster: the larger of what arithmetic and what memory takes (Williams et al. 2009, roofline)."""
        return 1e3 * max(flops / self.flops, nbytes / self.bandwidth)

    def limit(self, flops: int, nbytes: int) -> str:
        return "arithmetic" if flops / self.flops > nbytes / self.bandwidth else "memory"


CARDS = {
    "910B": Card("Ascend 910B class (Atlas 800T/800I A2)", flops=350e12, bandwidth=1.6e12, memory=64e9),
    "310P": Card("one of the two chips of an Atlas 300I DUO", flops=70e12, bandwidth=204e9, memory=48e9),
}
