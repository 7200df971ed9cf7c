"""Ranks as threads of one process, for proofs on one machine; only a broken test waits longer than TIMEOUT_S seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest

from staticvl.compiler.lockstep import ArrayGroup, Lockstep, TensorGroup
from staticvl.compiler.lockstep_stages import StageGroup, channels_between
from staticvl.model_defs.group import group_of

__all__ = ["ArrayGroup", "Counting", "Lockstep", "StageGroup", "TensorGroup", "array_group", "run_ranks", "world"]

T = TypeVar("T")
TIMEOUT_S = 60.0


@dataclass
class Counting(ArrayGroup):
    """A rank that counts its collectives, and the bytes that it brings to them."""

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
    monkeypatch.setattr(ArrayGroup, "all_reduce", lambda self, array: None)


def reversed_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: the last rank comes first."""
    right = ArrayGroup.all_gather

    def reverse(self: ArrayGroup, array: np.ndarray, out: np.ndarray) -> None:
        right(self, array, out)
        out[...] = np.concatenate(np.split(out, self.size, axis=-1)[::-1], axis=-1)

    monkeypatch.setattr(ArrayGroup, "all_gather", reverse)


def run_ranks(size: int, work: Callable[[int], T]) -> tuple[list[T], list[str]]:
    """`work` of every rank at once, and the collective calls that each made; raises what the first failing rank raised."""
    lockstep = Lockstep(size, TIMEOUT_S)
    return lockstep.run(work), lockstep.calls


def world(tp: int, pp: int) -> list[StageGroup]:
    """Every rank of a pipeline, by its number."""
    channels, locksteps = channels_between(tp, pp), [Lockstep(tp, TIMEOUT_S) for _ in range(pp)]
    return [StageGroup(locksteps[stage], rank, stage, pp, channels=channels) for stage in range(pp) for rank in range(tp)]


M = TypeVar("M", bound=ArrayGroup)


def array_group(size: int, kind: type[M] = ArrayGroup) -> M:
    """This thread's rank, for arrays."""
    member = group_of(size)
    assert isinstance(member, TensorGroup)
    return kind(member.lockstep, member.rank)
