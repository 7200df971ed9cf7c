"""The group of ranks that a model is sharded over, for the definitions of ops.all_reduce and ops.all_gather.

A rank runs its graph inside `in_group`. A thread in no group is a group of one, enough for a model that is not sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """Collectives of one rank. All ranks make the same calls in the same order with tensors of one shape and dtype."""

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
    """In this thread, collectives in graphs use `group`."""
    before = _group.set(group)
    try:
        yield
    finally:
        _group.reset(before)


def group_of(ranks: int) -> Group:
    """The group that this thread is in; raises ValueError unless it has the number of ranks that the graph was sharded for."""
    group = _group.get() or ALONE
    if group.size != ranks:
        raise ValueError(f"the graph is for one of {ranks} ranks, but its group has {group.size}; run all ranks together")
    return group
