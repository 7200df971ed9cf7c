"""What a card could take for each graph of an artifact: figures, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from ..runtime.artifact import GraphSpec, Manifest
from .cards import KERNEL_US, Card


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernels of a compiled graph, and what a run takes with the time that each costs."""

    kernels: int
    layers: int  # of the decoder; 0: the graph is not of it
    ms: float
    unsized: int  # tensors that are counted as no bytes

    @property
    def layer_kernels(self) -> float | None:
        """Kernels of the whole graph, divided by the layers of the decoder."""
        return self.kernels / self.layers if self.layers else None


@dataclass(frozen=True, slots=True)
class Forecast:
    """One graph on a card: what it computes and moves, the least time for that, and what more kernels take."""

    graph: str
    flops: int
    nbytes: int
    ms: float
    limit: str  # arithmetic or memory
    tokens: int  # of a run; 0: none
    launches: Launches | None = None  # of a graph that was lowered

    def rate(self, ms: float) -> float:
        """Tokens a second where a run takes so long."""
        return 1e3 * self.tokens / ms


def forecasts(manifest: Manifest, card: Card) -> list[Forecast]:
    """In the order of the table. Counts are those of the lowered graph, where the artifact has them; else its definition's."""
    layers = manifest.cache.layers + (manifest.cache.cross.layers if manifest.cache.cross else 0)
    graphs = sorted(manifest.graphs, key=lambda g: (g.kind, g.images, g.bucket))
    return [_forecast(graph, card, 0 if graph.kind == "vision" else layers) for graph in graphs]


def _forecast(graph: GraphSpec, card: Card, layers: int) -> Forecast:
    lowered = graph.lowered or None
    flops, nbytes = (lowered.flops, lowered.nbytes) if lowered else (graph.flops, graph.nbytes)
    return Forecast(
        graph=graph.name,
        flops=flops,
        nbytes=nbytes,
        ms=card.bound_ms(flops, nbytes),
        limit=card.limit(flops, nbytes),
        tokens=0 if graph.kind == "vision" else graph.bucket,
        launches=lowered and Launches(lowered.kernels, layers, card.run_ms(flops, nbytes, lowered.kernels), lowered.unsized),
    )


def forecast_table(rows: Sequence[Forecast], card: Card) -> Table:
    """Operations and bytes of each graph, and the least time that the card needs for them."""
    table = Table(title=f"at best on {card.name}")
    for column in ("graph", "GFLOP", "MB", "ms", "bound by", "tokens/s"):
        table.add_column(column, justify="left" if column in ("graph", "bound by") else "right")
    for row in rows:
        rate = f"{row.rate(row.ms):.0f}" if row.tokens else "-"
        table.add_row(row.graph, f"{row.flops / 1e9:.3g}", f"{row.nbytes / 1e6:.4g}", f"{row.ms:.3g}", row.limit, rate)
    return table


def launch_table(rows: Sequence[Forecast]) -> Table | None:
    """Kernels of lowered graphs, and the time of a run with what each costs; None: no graph was lowered."""
    lowered = [(row, row.launches) for row in rows if row.launches]
    if not lowered:
        return None
    table = Table(title=f"with {KERNEL_US:g} us for each kernel, an assumption")
    if unsized := sum(launches.unsized for _, launches in lowered):
        table.caption = f"{unsized} tensors of unknown size are counted as no bytes"
    for column in ("graph", "kernels", "a layer", "ms without", "ms", "tokens/s"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for row, launches in lowered:
        layer = "-" if launches.layer_kernels is None else f"{launches.layer_kernels:.1f}"
        rate = f"{row.rate(launches.ms):.0f}" if row.tokens else "-"
        table.add_row(row.graph, str(launches.kernels), layer, f"{row.ms:.3g}", f"{launches.ms:.3g}", rate)
    return table
