"""One run of a graph as it happened: the artifact's state right before it, so that it can be run again and looked into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact import GraphSpec, is_cached
from ...runtime.backends.base import Feed
from .forced import Ran
from .sides import Prepared
from .static_side import StaticSide


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """`caches` [B, K, S, D] are what the graph's cached inputs held."""

    graph: GraphSpec
    feed: Feed
    caches: dict[str, np.ndarray]
    image: int
    number: int  # of the run within its request
    past: dict[int, int]  # slot -> rows of the cache that were valid before
    count: int  # real tokens, tiles or rows


def capture(
    side: StaticSide,
    prompts: Sequence[Prepared],
    answers: Sequence[np.ndarray],
    route: dict[str, int] | None,
    *,
    most: int | None = None,
    caches: bool = True,
) -> list[Captured]:
    """The runs that a request takes, at most `most` of one graph, with what the `caches` held before."""
    found: list[Captured] = []
    counted: dict[str, int] = {}
    runs = 0

    def watch(ran: Ran) -> None:
        nonlocal runs
        step = ran.step
        graph = side.engine.graphs[step.graph_key]
        runs += 1
        counted[graph.name] = counted.get(graph.name, 0) + 1
        if most is not None and counted[graph.name] > most:
            return
        feed = {name: array.copy() for name, array in ran.feed.items()}
        kept = _caches(side, graph, ran) if caches else {}
        found.append(Captured(graph, feed, kept, ran.image, runs, dict(ran.past), step.count))

    side.engine.watch = watch
    try:
        side.say(prompts, answers, route=route)
    finally:
        side.engine.watch = None
    return found


def _caches(side: StaticSide, graph: GraphSpec, ran: Ran) -> dict[str, np.ndarray]:
    wanted = [spec for spec in graph.inputs if is_cached(spec.name)]
    backend = side.engine.backend
    return {spec.name: backend.read_cache(spec.name, ran.slot + spec.shape[0])[ran.slot :] for spec in wanted}
