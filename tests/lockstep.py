"""Ranks as threads of one process that meet at a barrier: a group whose sums are in rank order, for proofs on one machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from staticvl.model_defs.group import group_of, member_of

T = TypeVar("T")
X = TypeVar("X", Tensor, np.ndarray)
PATIENCE = 60.0  # seconds; only a broken test waits this long


@dataclass
class Meeting:
    """What the ranks of one group share."""

    size: int
    parts: dict[int, tuple[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # as rank 0 made them

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=PATIENCE)

    def exchange(self, rank: int, call: str, x: X) -> list[X]:
        """What every rank has brought to this call, by rank."""
        self.parts[rank] = call, x
        self.barrier.wait()
        brought = [self.parts[i] for i in range(self.size)]
        self.barrier.wait()
        assert len({(call, part.shape, part.dtype) for call, part in brought}) == 1, brought
        if rank == 0:
            self.calls.append(call)
        return [part for _, part in brought]


@dataclass
class Member:
    """See model_defs.group.Group."""

    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *others = self.meeting.exchange(self.rank, "all_reduce", x)
        total = first.float().clone()
        for each in others:
            total += each
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, "all_gather", x), dim=-1)


@dataclass
class ArrayMember:
    """See runtime.backends.base.Group."""

    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, array: np.ndarray) -> None:
        first, *others = self.meeting.exchange(self.rank, "all_reduce", array.copy())  # others may still read it
        array[...] = first
        for each in others:
            array += each

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        np.concatenate(self.meeting.exchange(self.rank, "all_gather", array.copy()), axis=-1, out=out)


@dataclass
class Counting(ArrayMember):
    """A member that notes how often it met the others, and the bytes that it brought."""

    calls: int = 0
    nbytes: int = 0

    def all_reduce(self, array: np.ndarray) -> None:
        self._note(array)
        super().all_reduce(array)

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        self._note(array)
        super().all_gather(array, out)

    def _note(self, array: np.ndarray) -> None:
        self.calls += 1
        self.nbytes += array.nbytes


def run_ranks(size: int, work: Callable[[int], T]) -> tuple[list[T], list[str]]:
    """`work` of every rank at once, and the collective calls that each made; raises what the first failing rank raised."""
    meeting = Meeting(size)

    def run(rank: int) -> T:
        try:
            with member_of(Member(meeting, rank)):
                return work(rank)
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures], meeting.calls


M = TypeVar("M", bound=ArrayMember)


def member_in(size: int, kind: type[M] = ArrayMember) -> M:
    """This thread's rank, for arrays."""
    member = group_of(size)
    assert isinstance(member, Member)
    return kind(member.meeting, member.rank)
