"""Rank 0's backend: it sends every call to all ranks, and all run it. The engine is the same for any number of ranks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from ...artifact import GraphSpec, Manifest, is_cached
from ..base import Backend, Result, checked
from .monitor import RankMonitor
from .protocol import Copy, CopyPage, FrameKind, FramePayload, GiveBack, Header


class _FeedMessage:
    """A graph's feed as the bytes that are sent, made once for arrays that are refilled."""

    def __init__(self, graph: GraphSpec, feed: Mapping[str, np.ndarray]) -> None:
        specs = [spec for spec in graph.inputs if not is_cached(spec.name)]
        self.feed, self.arrays = feed, dict(feed)
        inputs = [checked(graph, spec, feed[spec.name]) for spec in specs]
        self.views = [array.data.cast("B") for array in inputs if array.nbytes]
        self.nbytes = sum(view.nbytes for view in self.views)

    def matches(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether it was made of the arrays of this feed."""
        return self.feed is feed or all(self.arrays.get(name) is array for name, array in feed.items())


class LeaderBackend:
    """See backends.base.Backend. Raises RankError when a rank fails; then, and after `close`, nothing runs any more.

    The cache that is read and written is this rank's shard.
    """

    def __init__(self, local: Backend, monitor: RankMonitor, manifest: Manifest) -> None:
        self.local, self.monitor = local, monitor
        self.graph_indices = {graph.file: place for place, graph in enumerate(manifest.graphs)}
        stages = [{graph.name for graph in manifest.of_stage(stage).graphs} for stage in range(manifest.pp)]
        # By graph: the workers that run it. Not every stage of a pipeline has a part in every graph.
        self.graph_workers = [
            [rank for rank in range(1, manifest.ranks) if graph.name in stages[rank // manifest.tp]]
            for graph in manifest.graphs
        ]
        self.messages: dict[str, _FeedMessage] = {}
        self.run_count = 0
        # Also at the end of the interpreter, so that the other ranks get a STOP frame.
        self.close = weakref.finalize(self, monitor.close)

    def load(self, graph: GraphSpec) -> None:
        self._run_on_all(Header(FrameKind.LOAD, self.graph_indices[graph.file]), partial(self.local.load, graph))

    def unload(self, graph: GraphSpec) -> None:
        self.messages.pop(graph.file, None)
        self._run_on_all(Header(FrameKind.UNLOAD, self.graph_indices[graph.file]), partial(self.local.unload, graph))

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        message = self.messages.get(graph.file)
        if message is None or not message.matches(feed):
            message = self.messages[graph.file] = _FeedMessage(graph, feed)
        self.run_count += 1
        header = Header(FrameKind.RUN, self.graph_indices[graph.file], slot, image, self.run_count, message.nbytes)
        result = self._run_on_all(header, partial(self.local.run, graph, feed, slot, image), message.views)
        if result.on_host:
            return result
        return Result(lambda rows: self.monitor.run_watched(partial(result.fetch, rows)), result.candidates, on_host=False)

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        copy = partial(self.local.copy_slot, source, target, rows, images)
        self._call_on_all(FrameKind.COPY, copy, Copy(source, target, rows, images))

    def copy_page(self, source: int, target: int) -> None:
        copy = partial(self.local.copy_page, source, target)
        self._call_on_all(FrameKind.COPY_PAGE, copy, CopyPage(source, target))

    def give_back(self, slot: int, rows: int) -> None:
        self._call_on_all(FrameKind.GIVE_BACK, partial(self.local.give_back, slot, rows), GiveBack(slot, rows))

    def use_small_pages(self) -> None:
        self._call_on_all(FrameKind.SMALL_PAGES, partial(self.local.use_small_pages))

    def _call_on_all(self, kind: FrameKind, call: partial, payload: FramePayload | None = None) -> None:
        """Let every rank do to its cache what this one does."""
        data = msgspec.json.encode(payload) if payload else b""
        self._run_on_all(Header(kind, nbytes=len(data)), call, [memoryview(data)] if data else (), sorted(self.monitor.links))

    def _run_on_all(
        self, header: Header, call: partial, views: Sequence[memoryview] = (), workers: Sequence[int] | None = None
    ):
        """Send a frame to the workers and run this rank's part. `workers`: default those that run the header's graph."""
        monitor = self.monitor

        def work():
            monitor.send(self.graph_workers[header.graph] if workers is None else workers, header, views)
            return call()

        return monitor.run_watched(work)

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.monitor.run_watched(partial(self.local.read_cache, name, slots))

    def write_cache(self, name: str, value: np.ndarray) -> None:
        self.monitor.run_watched(partial(self.local.write_cache, name, value))
