"""Rank 0's backend: what it is asked to do, every rank does. So the engine knows nothing of ranks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from ...artifact import GraphSpec, Manifest, is_cached
from ..base import Backend, Result, checked
from .monitor import RankMonitor
from .protocol import Copy, FrameKind, Header


class _Message:
    """A graph's feed as the bytes that are sent, made once for arrays that are refilled."""

    def __init__(self, graph: GraphSpec, feed: Mapping[str, np.ndarray]) -> None:
        specs = [spec for spec in graph.inputs if not is_cached(spec.name)]
        self.feed, self.fed = feed, dict(feed)
        arrays = [checked(graph, spec, feed[spec.name]) for spec in specs]
        self.views = [array.data.cast("B") for array in arrays if array.nbytes]
        self.nbytes = sum(view.nbytes for view in self.views)

    def holds(self, feed: Mapping[str, np.ndarray]) -> bool:
        return self.feed is feed or all(self.fed.get(name) is array for name, array in feed.items())


class LeaderBackend:
    """See backends.base.Backend. Raises RankError when a rank fails; then, and after `close`, nothing runs any more.

    The cache that is read and written is this rank's part.
    """

    def __init__(self, local: Backend, monitor: RankMonitor, manifest: Manifest) -> None:
        self.local, self.monitor = local, monitor
        self.index = {graph.file: place for place, graph in enumerate(manifest.graphs)}
        stages = [{graph.name for graph in manifest.of_stage(stage).graphs} for stage in range(manifest.pp)]
        # Not every stage of a pipeline has a part in every graph.
        self.takers = [
            [rank for rank in range(1, manifest.ranks) if graph.name in stages[rank // manifest.tp]]
            for graph in manifest.graphs
        ]
        self.messages: dict[str, _Message] = {}
        self.step = 0
        # Also at the end of the interpreter: the other ranks are told to stop, not left to find out.
        self.close = weakref.finalize(self, monitor.close)

    def load(self, graph: GraphSpec) -> None:
        self._all(Header(FrameKind.LOAD, self.index[graph.file]), partial(self.local.load, graph))

    def unload(self, graph: GraphSpec) -> None:
        self.messages.pop(graph.file, None)
        self._all(Header(FrameKind.UNLOAD, self.index[graph.file]), partial(self.local.unload, graph))

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        message = self.messages.get(graph.file)
        if message is None or not message.holds(feed):
            message = self.messages[graph.file] = _Message(graph, feed)
        self.step += 1
        header = Header(FrameKind.RUN, self.index[graph.file], slot, image, self.step, message.nbytes)
        result = self._all(header, partial(self.local.run, graph, feed, slot, image), message.views)
        if result.here:
            return result
        return Result(lambda rows: self.monitor.together(partial(result.fetch, rows)), result.candidates, here=False)

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        data = msgspec.json.encode(Copy(source, target, rows, images))
        header = Header(FrameKind.COPY, nbytes=len(data))
        copy = partial(self.local.copy_slot, source, target, rows, images)
        self._all(header, copy, [memoryview(data)], sorted(self.monitor.links))

    def _all(self, header: Header, call: partial, views: Sequence[memoryview] = (), takers: Sequence[int] | None = None):
        """`takers`: the ranks that are told; default those that have a part in the header's graph."""
        monitor = self.monitor

        def work():
            monitor.send(self.takers[header.graph] if takers is None else takers, header, views)
            return call()

        return monitor.together(work)

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.monitor.together(partial(self.local.read_cache, name, slots))

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.monitor.together(partial(self.local.write_cache, name, value))
