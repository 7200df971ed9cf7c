"""Captured runs of graphs: the inputs and caches right before each, so that it can be run again and inspected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact import GraphSpec, is_cached
from ...runtime.backends.base import Feed
from ...runtime.engine.engine import GraphRun
from .sides import Prepared
from .static_side import StaticSide


@dataclass(frozen=True, slots=True, eq=False)
class CapturedRun:
    """One run of a graph. `caches`: the contents of the graph's cached inputs before it, [B, K, S, D] or all pages."""

    graph: GraphSpec
    feed: Feed
    caches: dict[str, np.ndarray]
    image: int
    number: int  # of the run within its request
    past: dict[int, int]  # row of a decode graph, for each sequence -> tokens of it that were in the cache before
    count: int  # real tokens, tiles or rows


def capture(
    side: StaticSide,
    prompts: Sequence[Prepared],
    answers: Sequence[np.ndarray],
    route: dict[str, int] | None,
    *,
    most: int | None = None,
    caches: bool = True,
) -> list[CapturedRun]:
    """The runs of forced requests, at most `most` of one graph; `caches`: with the contents of the caches before each."""
    captured: list[CapturedRun] = []
    counts: dict[str, int] = {}
    runs = 0

    def watch(run: GraphRun) -> None:
        nonlocal runs
        step = run.step
        graph = side.engine.graphs[step.graph_key]
        runs += 1
        counts[graph.name] = counts.get(graph.name, 0) + 1
        if most is not None and counts[graph.name] > most:
            return
        feed = {name: array.copy() for name, array in run.feed.items()}
        contents = _caches(side, graph, run) if caches else {}
        captured.append(CapturedRun(graph, feed, contents, run.image, runs, _past(side, run), step.count))

    side.engine.on_run = watch
    try:
        side.run_forced(prompts, answers, route=route)
    finally:
        side.engine.on_run = None
    return captured


def _past(side: StaticSide, run: GraphRun) -> dict[int, int]:
    cache, slots = side.engine.cache, run.step.slots
    return {row: int(cache.lengths[slot]) for row, slot in zip(cache.rows_of(slots), slots, strict=True)}


def _caches(side: StaticSide, graph: GraphSpec, run: GraphRun) -> dict[str, np.ndarray]:
    specs = [spec for spec in graph.inputs if is_cached(spec.name)]
    backend = side.engine.backend
    return {spec.name: backend.read_cache(spec.name, run.slot + spec.shape[0])[run.slot :] for spec in specs}
