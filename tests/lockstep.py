"""Ranks as threads of one process, for proofs on one machine; only a broken test waits longer than PATIENCE seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from staticvl.compiler.lockstep import ArrayMember, Meeting, Member, results_of
from staticvl.model_defs.group import member_of

__all__ = ["ArrayMember", "Meeting", "Member", "run_ranks"]

T = TypeVar("T")
PATIENCE = 60.0


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
