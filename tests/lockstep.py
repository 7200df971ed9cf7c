"""Ranks as threads of one process, for proofs on one machine; only a broken test waits longer than PATIENCE seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest

from staticvl.compiler.lockstep import ArrayMember, Meeting, Member
from staticvl.compiler.lockstep_stages import StageMember, ways_between
from staticvl.model_defs.group import group_of

__all__ = ["ArrayMember", "Counting", "Meeting", "Member", "StageMember", "member_in", "run_ranks", "world"]

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


def not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: every rank keeps its own part."""
    monkeypatch.setattr(ArrayMember, "all_reduce", lambda self, array: None)


def reversed_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: the last rank comes first."""
    right = ArrayMember.all_gather

    def reverse(self: ArrayMember, array: np.ndarray, out: np.ndarray) -> None:
        right(self, array, out)
        out[...] = np.concatenate(np.split(out, self.size, axis=-1)[::-1], axis=-1)

    monkeypatch.setattr(ArrayMember, "all_gather", reverse)


def run_ranks(size: int, work: Callable[[int], T]) -> tuple[list[T], list[str]]:
    """`work` of every rank at once, and the collective calls that each made; raises what the first failing rank raised."""
    meeting = Meeting(size, PATIENCE)
    return meeting.together(work), meeting.calls


def world(tp: int, pp: int) -> list[StageMember]:
    """Every rank of a pipeline, by its number."""
    ways, meetings = ways_between(tp, pp), [Meeting(tp, PATIENCE) for _ in range(pp)]
    return [StageMember(meetings[stage], rank, stage, pp, ways=ways) for stage in range(pp) for rank in range(tp)]


M = TypeVar("M", bound=ArrayMember)


def member_in(size: int, kind: type[M] = ArrayMember) -> M:
    """This thread's rank, for arrays."""
    member = group_of(size)
    assert isinstance(member, Member)
    return kind(member.meeting, member.rank)
