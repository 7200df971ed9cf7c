"""Published figures of Ascend cards, for forecasts of the cost of a graph."""

from __future__ import annotations

from dataclasses import dataclass

# Microseconds that a kernel takes however little it computes. An assumption: nothing was measured here. It follows a public
# figure of a 910B: an RMS norm of one row of 5,376 elements took 3.2 to 3.5 microseconds on the device, whose memory moves
# that row in 0.02 (github.com/flagos-ai/FlagGems-vllm, pull request 762).
KERNEL_US = 3.0


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

    def run_ms(self, flops: int, nbytes: int, kernels: int) -> float:
        """The bound, and KERNEL_US for each kernel: kernels run one after another, and each starts anew."""
        return self.bound_ms(flops, nbytes) + 1e-3 * KERNEL_US * kernels

    def limit(self, flops: int, nbytes: int) -> str:
        return "arithmetic" if flops / self.flops > nbytes / self.bandwidth else "memory"


CARDS = {
    "910B": Card("Ascend 910B class (Atlas 800T/800I A2)", flops=350e12, bandwidth=1.6e12, memory=64e9),
    "310P": Card("one of the two chips of an Atlas 300I DUO", flops=70e12, bandwidth=204e9, memory=48e9),
}
