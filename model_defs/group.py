"""The ranks among which a model is cut, as the definitions of ops.all_reduce and ops.all_gather see them.

A rank runs its graph inside `in_group`. A thread that is in no group is alone, which is enough for a model that is not cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """One rank's way to the others. All ranks make the same calls in the same order with tensors of one shape and dtype."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in fresh memory and the same on every rank."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """x [..., C] of all ranks, joined along the last axis with rank 0 first: [..., size * C] in fresh memory."""
        ...


class Alone:
    """The group of one rank."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    all_gather = all_reduce


ALONE = Alone()
_group: ContextVar[Group | None] = ContextVar("group", default=None)


@contextlib.contextmanager
def in_group(group: Group) -> Iterator[None]:
    """In this thread, graphs of one rank meet the others through `group`."""
    before = _group.set(group)
    try:
        yield
    finally:
        _group.reset(before)


def group_of(ranks: int) -> Group:
    """The group that this thread is in; raises ValueError unless it has as many members as the graph was cut for."""
    group = _group.get() or ALONE
    if group.size != ranks:
        raise ValueError(f"the graph is one rank's of {ranks}, but runs in a group of {group.size}; run all ranks together")
    return group
