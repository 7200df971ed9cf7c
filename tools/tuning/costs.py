"""Costs of a run of a graph: measured, or the least that a device needs (roofline).

Measured costs are those of an artifact's graphs (cost_ms in its manifest, or anew) or of a table that a person wrote; sizes
between them are read off a curve (curves.py). Without an artifact, operations and bytes are counted from the traced
definitions (compiler/cost.py) at two sizes for each kind, which is exact for all others because both are straight lines in the
size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...runtime.artifact import KINDS, GraphSpec, Kind, Manifest, open_artifact
from ...runtime.shown import quoted
from ..cards import Card
from .curves import CostError, Curve, fit

Key = tuple[Kind, int]  # graph kind, images that it sees


@dataclass(frozen=True, slots=True)
class Line:
    """Operations and bytes of a graph kind, straight lines in the size of the bucket: value at 0, and slope."""

    flops: tuple[float, float]
    nbytes: tuple[float, float]

    def ms(self, size: int, card: Card) -> float:
        (f0, f1), (b0, b1) = self.flops, self.nbytes
        return card.bound_ms(round(f0 + f1 * size), round(b0 + b1 * size))


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds of one run by kind, size and images seen; `source` describes their origin.

    `past_ms` is the further time of a run for each of its tokens and each token in the cache before it. It is 0 where a run
    always reads the whole cache, and where it was not measured. The runtime's planner does not use it.
    """

    source: str
    curves: Mapping[Key, Callable[[int], float]]
    past_ms: float = 0.0

    def ms(self, kind: Kind, size: int, images: int = 0) -> float:
        """Milliseconds of one run; raises CostError for a kind without costs."""
        variants = sorted(seen for each, seen in self.curves if each == kind)
        if not variants:
            raise CostError(
                f"there are no costs of {kind} graphs; give them in the table, or give an artifact that has such graphs"
            )
        return self.curves[kind, next((v for v in variants if v >= images), variants[-1])](size)

    def table(self, kind: Kind, sizes: Iterable[int], images: int = 0) -> dict[int, float]:
        return {size: self.ms(kind, size, images) for size in sizes}


def measured_costs(points: Mapping[Key, Mapping[int, float]], source: str, past_ms: float = 0.0) -> Costs:
    """Costs from measured points. A prefill of one token equals a decode step of one row, so where the smallest prefill
    measured is larger, the decode step stands in for it, for the fixed part of a run.
    """
    curves: dict[Key, Curve] = {}
    for (kind, images), costs in points.items():
        single = points.get(("decode", images), {}).get(1)
        if kind == "prefill" and single and single < min(costs.values()) and 1 not in costs:
            costs = {1: single, **costs}  # noqa: PLW2901
        curves[kind, images] = fit(costs)
    return Costs(source, curves, past_ms)


def manifest_points(manifest: Manifest) -> dict[Key, dict[int, float]]:
    """The costs that were measured when an artifact was compiled."""
    return _points((graph, graph.cost_ms) for graph in manifest.graphs)


def _points(costs: Iterable[tuple[GraphSpec, float]]) -> dict[Key, dict[int, float]]:
    points: dict[Key, dict[int, float]] = {}
    for graph, cost in costs:
        points.setdefault((graph.kind, graph.images), {})[graph.bucket] = cost
    return points


def remeasure(folder: Path, passes: int, threads: int | None) -> tuple[dict[Key, dict[int, float]], float]:
    """Milliseconds of every graph of an artifact on this machine with an empty cache, and past_ms. Each is the best of several
    passes over all graphs, since other work of the machine only ever adds time.
    """
    from ...runtime.backends.base import new_feed
    from ...runtime.backends.open import open_backend

    artifact = open_artifact(folder)  # held, so that a build does not remove what is opened here
    manifest = artifact.manifest
    backend = open_backend(manifest.backend, folder, manifest.cache, device="cpu", threads=threads, manifest=manifest)
    best: dict[tuple[str, int], float] = {}
    jobs = [(graph, past) for graph in manifest.graphs for past in dict.fromkeys((0, _past(graph, manifest)))]
    feeds = {graph.name: new_feed(graph) for graph in manifest.graphs}
    for graph in manifest.graphs:
        backend.run(graph, feeds[graph.name])  # opens it
    with tqdm(total=passes * len(jobs), desc="measuring", unit="run", disable=None) as bar:
        for graph, past in jobs * passes:
            if past:
                feeds[graph.name]["lengths"][:] = past
            started = time.perf_counter()
            backend.run(graph, feeds[graph.name])
            elapsed_ms = 1e3 * (time.perf_counter() - started)
            if past:
                feeds[graph.name]["lengths"][:] = 0
            best[graph.name, past] = min(elapsed_ms, best.get((graph.name, past), elapsed_ms))
            bar.update()
    artifact.close()
    more = sum(best[graph.name, past] - best[graph.name, 0] for graph, past in jobs if past)
    pairs = sum(graph.bucket * past for graph, past in jobs if past)
    return _points((graph, best[graph.name, 0]) for graph in manifest.graphs), max(0.0, more / pairs) if pairs else 0.0


def _past(graph: GraphSpec, manifest: Manifest) -> int:
    """The most tokens that may lie in the cache before a prefill; other graphs are measured with none."""
    return manifest.cache.context - graph.bucket if graph.kind == "prefill" else 0


def parse_costs(data: Any, where: str) -> Costs:
    """A table {prefill: {16: 4.1, ...}, decode: {...}, vision: {...}} of milliseconds, perhaps with past_ms (Costs); raises
    CostError.
    """
    if not isinstance(data, Mapping) or not set(data) & set(KINDS) or not set(data) <= {*KINDS, "past_ms"}:
        raise CostError(
            f"{where}: expected a mapping with some of the keys {', '.join(KINDS)}, each a mapping of size to milliseconds"
        )
    past_ms = data.get("past_ms", 0.0)
    if not isinstance(past_ms, int | float) or isinstance(past_ms, bool) or not 0 <= past_ms < float("inf"):
        raise CostError(f"{where}: past_ms is {quoted(past_ms)}; expected milliseconds of at least 0")
    points: dict[Key, dict[int, float]] = {}
    for kind in KINDS:
        if kind not in data:
            continue
        table = data[kind]
        valid = isinstance(table, Mapping) and all(
            type(size) is int and isinstance(cost, int | float) and not isinstance(cost, bool) for size, cost in table.items()
        )
        if not valid:
            raise CostError(
                f"{where}: {kind} is {quoted(table)}; expected a mapping of size to milliseconds, e.g. {{16: 4.1, 64: 9.5}}"
            )
        points[kind, 0] = {size: float(cost) for size, cost in table.items()}
        try:
            fit(points[kind, 0])
        except CostError as error:
            raise CostError(f"{where}: {kind}: {error}") from None
    return measured_costs(points, f"the table {where}", float(past_ms))


def costs_yaml(costs: Costs) -> str:
    """Measured costs as the table that parse_costs takes; without variants that see images, which it does not know. Raises
    CostError where costs were not measured.
    """
    lines = [f"# {costs.source}"]
    for (kind, images), curve in costs.curves.items():
        if not isinstance(curve, Curve):
            raise CostError("these costs were counted, not measured, so there is no table to save; leave --save-costs out")
        if images == 0:
            pairs = ", ".join(f"{size}: {cost:.6g}" for size, cost in zip(curve.sizes, curve.costs, strict=True))
            lines.append(f"{kind}: {{{pairs}}}")
    return "\n".join([*lines, f"past_ms: {costs.past_ms:.9f}"]) + "\n"


# ---- the roofline


def manifest_lines(manifest: Manifest) -> dict[Key, Line]:
    """Operations and bytes of an artifact's graphs; of a kind with one bucket, all bytes are taken to be fixed."""
    points: dict[Key, list[tuple[int, int, int]]] = {}
    for graph in manifest.graphs:
        points.setdefault((graph.kind, graph.images), []).append((graph.bucket, graph.flops, graph.nbytes))
    return {key: line_through(sorted(points)) for key, points in points.items()}


def line_through(points: list[tuple[int, int, int]]) -> Line:
    """The line through (size, flops, bytes) of the smallest and the largest size."""
    (low, low_flops, low_bytes), (high, high_flops, high_bytes) = points[0], points[-1]
    if low == high:
        return Line((0.0, low_flops / low), (low_bytes, 0.0))
    slopes = (high_flops - low_flops) / (high - low), (high_bytes - low_bytes) / (high - low)
    return Line((low_flops - slopes[0] * low, slopes[0]), (low_bytes - slopes[1] * low, slopes[1]))


def roofline_costs(lines: Mapping[Key, Line], card: Card, overhead_ms: float, source: str) -> Costs:
    """The least time that a card needs for each size, and `overhead_ms` for every run."""

    def curve(line: Line) -> Callable[[int], float]:
        return lambda size: line.ms(size, card) + overhead_ms

    return Costs(source, {key: curve(line) for key, line in lines.items()})


def this_cpu() -> Card:
    """The float32 speed and bandwidth of this processor, measured by a matrix product and a copy of memory, best of five."""
    size, block = 1024, np.ones(1 << 25, np.float32)
    matrix, target = np.ones((size, size), np.float32), np.empty_like(block)
    flops = 2 * size**3 / _best(lambda: matrix @ matrix)
    bandwidth = 2 * block.nbytes / _best(lambda: np.copyto(target, block))
    return Card("this CPU, as measured now", flops=flops, bandwidth=bandwidth, memory=0)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
