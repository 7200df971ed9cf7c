"""A forecast of each graph of an artifact on a card."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.artifact import GraphSpec, Manifest
from .cards import Card


@dataclass(frozen=True, slots=True, kw_only=True)
class CardBound:
    """The least that a run takes on a card."""

    ms: float
    bound_by: str  # arithmetic or memory
    tokens_per_s: float | None  # None: of a vision graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Kernels of a lowered graph, and a run with the time that each of them costs."""

    kernels: int
    layer_kernels: float | None  # kernels of the whole graph by the layers of the decoder; None: of a vision graph
    ms: float
    tokens_per_s: float | None
    unsized: int  # tensors of unknown size, counted as no bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Operations and bytes of one run, those of the lowered graph where the artifact has them, and times on a card."""

    flops: int
    nbytes: int
    bound: CardBound
    launches: Launches | None


def decoder_layers(manifest: Manifest) -> int:
    """All layers, cross-attention ones included."""
    return manifest.cache.layers + (manifest.cache.cross.layers if manifest.cache.cross else 0)


def forecast(graph: GraphSpec, card: Card, layers: int) -> Forecast:
    """`layers`: those of the decoder."""
    lowered = graph.lowered or None
    flops, nbytes = (lowered.flops, lowered.nbytes) if lowered else (graph.flops, graph.nbytes)
    ms, launches = card.bound_ms(flops, nbytes), None
    if lowered:
        slow_ms = card.run_ms(flops, nbytes, lowered.kernels)
        launches = Launches(
            kernels=lowered.kernels,
            layer_kernels=None if graph.kind == "vision" else lowered.kernels / layers,
            ms=slow_ms,
            tokens_per_s=_rate(graph, slow_ms),
            unsized=lowered.unsized,
        )
    bound = CardBound(ms=ms, bound_by=card.limit(flops, nbytes), tokens_per_s=_rate(graph, ms))
    return Forecast(flops=flops, nbytes=nbytes, bound=bound, launches=launches)


def _rate(graph: GraphSpec, ms: float) -> float | None:
    return None if graph.kind == "vision" or not ms else 1e3 * graph.bucket / ms
