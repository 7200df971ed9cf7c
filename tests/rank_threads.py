"""Ranks as threads that meet over real sockets and gloo, with fake backends: everything but processes and graphs."""

from __future__ import annotations

import contextlib
import gc
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from torch.distributed import HashStore

from staticvl.runtime.artifact import Artifact, GraphSpec
from staticvl.runtime.backends.base import Group, Result
from staticvl.runtime.backends.distributed import start
from staticvl.runtime.backends.distributed.leader import LeaderBackend
from staticvl.runtime.backends.distributed.world import LOOPBACK, World
from staticvl.runtime.engine.engine import Engine

from .fake_backend import FakeBackend

PATIENCE = 20.0  # seconds; only a broken test waits this long


class MeetingBackend(FakeBackend):
    """A fake that meets the others in every step, and sees to it that all were fed the same."""

    def __init__(self, artifact: Artifact, group: Group) -> None:
        super().__init__(artifact.manifest)
        self.group = group
        self.loaded: list[str] = []

    def load(self, graph: GraphSpec) -> None:
        super().load(graph)
        self.loaded.append(graph.name)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        digest = zlib.crc32(repr((graph.name, slot, image, list(feed))).encode())
        for array in feed.values():
            digest = zlib.crc32(array.tobytes(), digest)
        digests = np.empty(self.group.size, np.int64)
        self.group.all_gather(np.array([digest], np.int64), digests)
        if len(set(digests.tolist())) != 1:
            raise AssertionError(f"{graph.name}: ranks were fed different arrays")
        return super().run(graph, feed, slot, image)


Make = Callable[[int, Artifact, Group], MeetingBackend]


def _part(backend: LeaderBackend, backends: dict[int, MeetingBackend]) -> None:
    """Let go of the groups: processes end, but threads that wait in a collective only notice that its others are gone."""
    for each in backends.values():
        del each.group
    backend.monitor.in_collective = lambda: False
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("rank "):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread.name


@contextlib.contextmanager
def ranks_as_threads(
    monkeypatch: pytest.MonkeyPatch,
    artifact: Artifact,
    ranks: int,
    *,
    timeout: float = PATIENCE,
    make: Make = lambda rank, artifact, group: MeetingBackend(artifact, group),
) -> Iterator[tuple[Engine, list[Future[tuple[int, bool]]]]]:
    """An engine that leads `ranks` ranks, and what `run_worker` will return in the others. `make` makes each backend."""
    cut = Artifact(artifact.folder, msgspec.structs.replace(artifact.manifest, tp=ranks))
    backends: dict[int, MeetingBackend] = {}

    def open_backend(*_: object, group: Group, **__: object) -> MeetingBackend:
        return backends.setdefault(group.rank, make(group.rank, cut, group))

    monkeypatch.setattr(start, "open_backend", open_backend)
    monkeypatch.setattr(start, "open_checked", lambda folder, checks, rank: cut)
    store: Any = HashStore()
    settings: Any = {"device": "cpu", "threads": 1, "timeout": timeout}
    worlds = [World(rank, ranks, ranks, LOOPBACK) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        others = [pool.submit(start.run_worker, Path(), world, store, **settings) for world in worlds[1:]]
        backend: LeaderBackend = start.lead(cut, worlds[0], store, **settings)
        assert all(each.loaded == [graph.name for graph in cut.manifest.graphs] for each in backends.values())
        try:
            yield Engine(cut.manifest, backend), others
        finally:
            backend.close()
            _part(backend, backends)
