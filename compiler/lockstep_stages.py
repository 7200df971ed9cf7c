"""The stages of a pipeline as one backend: all ranks of all stages are threads of one process, so that a whole pipeline is run
as one model is."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import numpy as np

from ..runtime.artifact import CacheSpec, GraphSpec, Manifest
from ..runtime.backends.base import Backend, Result
from .lockstep import ArrayGroup, Lockstep, LockstepBackend, results_of, with_all_heads

Channels = dict[tuple[int, int, int], SimpleQueue[np.ndarray | None]]  # by stage of the sender, stage of the receiver, and rank


@dataclass
class StageGroup(ArrayGroup):
    """A rank of one stage; `channels` are shared by all ranks of all stages."""

    channels: Channels = field(kw_only=True)

    def send(self, array: np.ndarray, stage: int) -> None:
        self.channels[self.stage, stage, self.rank].put(array.copy())

    def receive(self, array: np.ndarray, stage: int) -> None:
        received = self.channels[stage, self.stage, self.rank].get(timeout=self.lockstep.timeout)
        if received is None:
            raise threading.BrokenBarrierError  # as of a rank that others have failed
        array[...] = received


def channels_between(tp: int, pp: int) -> Channels:
    return {place: SimpleQueue() for place in itertools.product(range(pp), range(pp), range(tp))}


class PipelineBackend:
    """See runtime.backends.base.Backend. It takes graphs of `whole_pipeline`; caches are numbered through all stages."""

    def __init__(self, manifest: Manifest, open_rank: Callable[[Manifest, ArrayGroup], Backend]) -> None:
        """`open_rank` opens the backend of one rank, given its stage's manifest and the group."""
        tp, pp, self.channels = manifest.tp, manifest.pp, channels_between(manifest.tp, manifest.pp)
        own = [manifest.of_stage(stage) for stage in range(pp)]
        self.graphs = [{graph.name: with_all_heads(graph, tp) for graph in each.graphs} for each in own]
        self.stages = [self._stage(own[stage], stage, open_rank) for stage in range(pp)]
        self.places = _places([each.cache for each in own])
        self.pool = ThreadPoolExecutor(pp)

    def _stage(self, own: Manifest, stage: int, open_rank: Callable[[Manifest, ArrayGroup], Backend]) -> LockstepBackend:
        def make_group(lockstep: Lockstep, rank: int) -> ArrayGroup:
            return StageGroup(lockstep, rank, stage, own.pp, channels=self.channels)

        return LockstepBackend(own.tp, lambda group: open_rank(own, group), make_group, paged=bool(own.cache.pages))

    def load(self, graph: GraphSpec) -> None:
        for stage, graphs in zip(self.stages, self.graphs, strict=True):
            if graph.name in graphs:
                stage.load(graphs[graph.name])

    def unload(self, graph: GraphSpec) -> None:
        for stage, graphs in zip(self.stages, self.graphs, strict=True):
            if graph.name in graphs:
                stage.unload(graphs[graph.name])

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        """The result of the first stage's first rank; raises the exception of the first stage that failed by itself."""

        def work(stage: int) -> Result:
            try:
                return self.stages[stage].run(self.graphs[stage][graph.name], feed, slot, image)
            except BaseException:
                for channel in self.channels.values():
                    channel.put(None)
                raise

        stages = [stage for stage, graphs in enumerate(self.graphs) if graph.name in graphs]
        return results_of([self.pool.submit(work, stage) for stage in stages])[0]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        stage, own = self.places[name]
        return self.stages[stage].read_cache(own, slots)

    def write_cache(self, name: str, value: np.ndarray) -> None:
        stage, own = self.places[name]
        self.stages[stage].write_cache(own, value)

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        for stage in self.stages:
            stage.copy_slot(source, target, rows, images)

    def copy_page(self, source: int, target: int) -> None:
        for stage in self.stages:
            stage.copy_page(source, target)

    def give_back(self, slot: int, rows: int) -> None:
        for stage in self.stages:
            stage.give_back(slot, rows)

    def use_small_pages(self) -> None:
        for stage in self.stages:
            stage.use_small_pages()


def whole_pipeline(manifest: Manifest) -> Manifest:
    """The manifest with the layers of all stages in its cache, and the heads of all ranks in that and in its graphs."""
    own = [manifest.of_stage(stage) for stage in range(manifest.pp)]
    cache = manifest.cache
    if cross := cache.cross:
        layers = sum(each.cache.cross.layers for each in own if each.cache.cross)
        cache = msgspec.structs.replace(cache, cross=msgspec.structs.replace(cross, layers=layers))
    layers, heads = sum(each.cache.layers for each in own), cache.kv_heads * manifest.tp
    return msgspec.structs.replace(
        manifest,
        cache=msgspec.structs.replace(cache, layers=layers, kv_heads=heads),
        graphs=tuple(with_all_heads(graph, manifest.tp) for graph in manifest.graphs),
    )


def _places(caches: Sequence[CacheSpec]) -> dict[str, tuple[int, str]]:
    """Names of the whole cache's parts -> (stage, name there)."""
    places, before, crossed = {}, 0, 0
    for stage, cache in enumerate(caches):
        for own in cache.buffers():
            which, layer, *image = own.split(".")
            first = crossed if which.startswith("cross_") else before
            places[".".join((which, str(int(layer) + first), *image))] = stage, own
        before += cache.layers
        crossed += cache.cross.layers if cache.cross else 0
    return places
