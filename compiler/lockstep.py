"""The ranks of a model as threads of one process that wait for each other at each collective.

This checks graphs of one rank, whose results need the collectives of all ranks. Sums are made in rank order: all ranks get the
same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..model_defs.group import in_group
from ..runtime.artifact import GraphSpec, TensorSpec, is_cached
from ..runtime.backends.base import Backend, Result, cache_name, is_text
from .check import CertificateError

T = TypeVar("T")
X = TypeVar("X", Tensor, np.ndarray)


@dataclass
class Lockstep:
    """The shared state of the ranks of one group. `timeout`: seconds that a rank waits for the others; None: without limit."""

    size: int
    timeout: float | None = None
    parts: dict[int, tuple[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # as rank 0 made them

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=self.timeout)

    def exchange(self, rank: int, call: str, x: X) -> list[X]:
        """The tensors of all ranks in this call, by rank; `x` is that of `rank`."""
        self.parts[rank] = call, x
        self.barrier.wait()
        parts = [self.parts[i] for i in range(self.size)]
        self.barrier.wait()
        assert len({(call, part.shape, part.dtype) for call, part in parts}) == 1, parts
        if rank == 0:
            self.calls.append(call)
        return [part for _, part in parts]

    def run(self, work: Callable[[int], T], pool: Executor | None = None) -> list[T]:
        """The results of `work` on all ranks at once, by rank.

        Raises the exception of the first rank that failed by itself, after which the others do not wait. `pool` has a thread
        for every rank; None: one is made.
        """
        if pool is None:
            with ThreadPoolExecutor(self.size) as own:
                return self.run(work, own)
        return results_of([pool.submit(self._run_rank, work, rank) for rank in range(self.size)])

    def _run_rank(self, work: Callable[[int], T], rank: int) -> T:
        try:
            with in_group(TensorGroup(self, rank)):
                return work(rank)
        except BaseException:
            self.barrier.abort()
            raise


@dataclass
class TensorGroup:
    """A lockstep as one rank sees it, for definitions; see model_defs.group.Group."""

    lockstep: Lockstep
    rank: int

    @property
    def size(self) -> int:
        return self.lockstep.size

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self.lockstep.exchange(self.rank, "all_reduce", x)
        total = first.float().clone()
        for each in others:
            total += each
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.lockstep.exchange(self.rank, "all_gather", x), dim=-1)


@dataclass
class ArrayGroup:
    """A lockstep as one rank sees it, for compiled graphs; see runtime.backends.base.Group."""

    lockstep: Lockstep
    rank: int
    stage: int = 0
    stages: int = 1

    @property
    def size(self) -> int:
        return self.lockstep.size

    def send(self, array: np.ndarray, stage: int) -> None:
        raise NotImplementedError("stages are checked one by one")

    receive = send

    def all_reduce(self, array: np.ndarray) -> None:
        first, *others = self.lockstep.exchange(self.rank, "all_reduce", array.copy())  # others may still read it
        array[...] = first
        for each in others:
            array += each

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        np.concatenate(self.lockstep.exchange(self.rank, "all_gather", array.copy()), axis=-1, out=out)


def results_of(futures: Sequence[Future[T]]) -> list[T]:
    """The results of all ranks; raises the exception of a rank that failed by itself before those of ranks that lost it."""
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


class LockstepBackend:
    """All ranks of a model as one backend: see runtime.backends.base.Backend.

    It takes `with_all_heads` graphs, whose caches hold the heads of all ranks one after another, and gives each rank its own.
    """

    def __init__(
        self,
        size: int,
        open_rank: Callable[[ArrayGroup], Backend],
        make_group: Callable[[Lockstep, int], ArrayGroup] = ArrayGroup,
        *,
        paged: bool = False,
    ) -> None:
        """`open_rank` opens the backend of one rank in its group, which `make_group` makes of the lockstep and the rank.
        `paged`: whether the text's cache is in pages.
        """
        self.paged = paged
        self.lockstep = Lockstep(size)
        self.ranks = [open_rank(make_group(self.lockstep, rank)) for rank in range(size)]
        self.pool = ThreadPoolExecutor(size)
        self.rank_graphs: dict[str, GraphSpec] = {}  # by file

    def load(self, graph: GraphSpec) -> None:
        for rank in self.ranks:
            rank.load(self._of_rank(graph))

    def unload(self, graph: GraphSpec) -> None:
        for rank in self.ranks:
            rank.unload(self._of_rank(graph))
        self.rank_graphs.pop(graph.file, None)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        """As of any backend; raises CertificateError where ranks differ in what they all compute."""
        results = self.lockstep.run(lambda rank: self.ranks[rank].run(self._of_rank(graph), feed, slot, image), self.pool)
        if cache_name(graph.outputs[0].name, image) is None:
            for rank, result in enumerate(results):
                if not np.array_equal(result.first, results[0].first, equal_nan=True):
                    raise CertificateError(
                        f"{graph.name}: rank {rank} does not compute what rank 0 computes; this build must not be used"
                    )
        return results[0]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return np.concatenate([rank.read_cache(name, slots) for rank in self.ranks], axis=_heads_axis(name, self.paged))

    def write_cache(self, name: str, value: np.ndarray) -> None:
        parts = np.split(value, len(self.ranks), axis=_heads_axis(name, self.paged))
        for rank, part in zip(self.ranks, parts, strict=True):
            rank.write_cache(name, np.ascontiguousarray(part))

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        for rank in self.ranks:
            rank.copy_slot(source, target, rows, images)

    def copy_page(self, source: int, target: int) -> None:
        for rank in self.ranks:
            rank.copy_page(source, target)

    def give_back(self, slot: int, rows: int) -> None:
        for rank in self.ranks:
            rank.give_back(slot, rows)

    def use_small_pages(self) -> None:
        for rank in self.ranks:
            rank.use_small_pages()

    def _of_rank(self, graph: GraphSpec) -> GraphSpec:
        if graph.file not in self.rank_graphs:
            self.rank_graphs[graph.file] = _with_heads(graph, lambda heads: heads // len(self.ranks))
        return self.rank_graphs[graph.file]


def with_all_heads(graph: GraphSpec, ranks: int) -> GraphSpec:
    """A rank's graph as LockstepBackend takes it."""
    return _with_heads(graph, lambda heads: heads * ranks)


def _with_heads(graph: GraphSpec, change: Callable[[int], int]) -> GraphSpec:
    paged = any(spec.name == "block_table" for spec in graph.inputs)

    def changed(spec: TensorSpec) -> TensorSpec:
        if not is_cached(spec.name):
            return spec
        axis, shape = _heads_axis(spec.name, paged), list(spec.shape)
        shape[axis] = change(shape[axis])
        return msgspec.structs.replace(spec, shape=tuple(shape))

    inputs, outputs = tuple(map(changed, graph.inputs)), tuple(map(changed, graph.outputs))
    return msgspec.structs.replace(graph, inputs=inputs, outputs=outputs)


def _heads_axis(name: str, paged: bool) -> int:
    """The axis of the heads in a cache buffer: of [slots, K, S, D] or of pages [Z, P, K, D]."""
    return 2 if paged and is_text(name) else 1
