"""Ranks as threads of one process, for proofs on one machine; only a broken test waits longer than PATIENCE seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from staticvl.compiler.lockstep import ArrayMember, Meeting, Member, results_of
from staticvl.model_defs.group import group_of, member_of

__all__ = ["ArrayMember", "Counting", "Meeting", "Member", "member_in", "run_ranks"]

T = TypeVar("T")
PATIENCE = 60.0


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
    meeting = Meeting(size, PATIENCE)

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
    return results_of(futures), meeting.calls


M = TypeVar("M", bound=ArrayMember)


def member_in(size: int, kind: type[M] = ArrayMember) -> M:
    """This thread's rank, for arrays."""
    member = group_of(size)
    assert isinstance(member, Member)
    return kind(member.meeting, member.rank)
