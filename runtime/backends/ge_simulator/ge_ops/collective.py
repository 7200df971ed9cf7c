"""Operators between the ranks of a group, through the `Group` that the simulator was given.

A group goes by its ranks, `tag=T;rank_list=0,1,...`, and has to be that of all ranks (see process_groups.py). `fusion` says
whether a device may join several collectives, and changes no value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ascend.process_groups import ranks_of
from ...base import Group, check_group
from ..collectives import all_gather, all_reduce
from .registry import NodeContext, UnsupportedError, ge_op

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@ge_op("HcomAllReduce", fusion_id=-1)
def hcom_all_reduce(x: Tensor, *, reduction: str, group: str, context: NodeContext, fusion: int = 1) -> Tensor:
    """The sum of x over the ranks of a group."""
    if reduction != "sum":
        raise UnsupportedError(f"attribute reduction = {reduction!r} is not supported; only 'sum' is")
    return all_reduce(x, _members(x, group, fusion, context))


@ge_op("HcomAllGather", fusion_id=-1)
def hcom_all_gather(x: Tensor, *, rank_size: int, group: str, context: NodeContext, fusion: int = 0) -> Tensor:
    """The x [M, ...] of all ranks joined along the first axis, rank 0 first: [rank_size * M, ...]."""
    members = _members(x, group, fusion, context)
    if rank_size != (size := members.size if members else 1):
        raise UnsupportedError(f"attribute rank_size = {rank_size} is not supported; group = {group!r} has {size} ranks")
    # Joined along the only axis: the order of memory.
    return all_gather(x.flatten(), members).reshape(rank_size * x.shape[0], *x.shape[1:])


def _members(x: Tensor, group: str, fusion: int, context: NodeContext) -> Group | None:
    """The group of a collective over x; None where it is one rank alone."""
    if x.dtype not in _FLOATS:
        raise UnsupportedError(f"input x is {x.dtype}; only float32, float16 and bfloat16 are exchanged")
    if fusion not in (0, 1, 2):
        raise UnsupportedError(f"attribute fusion = {fusion} is not supported; expected 0, 1 or 2")
    ranks = ranks_of(group)
    if ranks is None:
        raise UnsupportedError(f"attribute group = {group!r} names no ranks; expected tag=...;rank_list=0,1,...")
    if ranks != list(range(len(ranks))):
        raise UnsupportedError(f"attribute group = {group!r} is not supported; only the group of all ranks is, from 0 on")
    return check_group("the graph", len(ranks), context.group) if len(ranks) > 1 else None
