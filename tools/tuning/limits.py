"""What a choice of buckets must keep, and the choice itself."""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.artifact import Kind
from .costs import Costs

COMPILE_RUNS = 20  # of each graph when it is compiled: checks by two backends, and its cost
COMPILE_S = 1.0  # to trace and to write a graph


class LimitError(ValueError):
    """Limits that nothing keeps; the message says which one to raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the choice must keep; None: no limit. Graphs are counted as `staticvl compile --plan-only` lists them."""

    prefill: int = 6
    decode: int = 6
    vision: int = 4
    graphs: int | None = None
    compile_s: float | None = None
    memory: float | None = None  # bytes of weights and cache
    context: int | None = None
    slots: int | None = None  # exactly so many
    most_slots: int = 32
    granularity: int = 16
    largest: int = 2048
    prefill_sizes: tuple[int, ...] = ()  # to choose prefill buckets from; (): multiples of granularity
    least_saving: float = 0.001  # share of a kind's time that one more graph of it must save


@dataclass(frozen=True, slots=True)
class Chosen:
    """A set of buckets of each kind, ascending; `vision` is empty where the trace has no images."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    vision: tuple[int, ...]
    images: tuple[int, ...]  # variants besides the one without images
    context: int
    slots: int

    def of(self, kind: Kind) -> tuple[int, ...]:
        return getattr(self, kind)

    @property
    def graphs(self) -> int:
        return len(self.vision) + (1 + len(self.images)) * (len(self.prefill) + len(self.decode))


def compile_s(costs: Costs, kind: Kind, size: int, images: int) -> float:
    """An estimate of the seconds that compiling one graph takes, on a machine where it runs at these costs."""
    return COMPILE_S + COMPILE_RUNS * costs.ms(kind, size, images) / 1e3
