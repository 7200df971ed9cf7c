"""Operators between the ranks of a group, over torch.distributed (gloo)."""

from __future__ import annotations

import re

import torch.distributed as dist
from torch import Tensor

from .reduce import wide
from .registry import UnsupportedError, ge_op

_REDUCTIONS = {"sum": "SUM", "min": "MIN", "max": "MAX", "prod": "PRODUCT"}


@ge_op("HcomAllReduce", fusion_id=-1)
def hcom_all_reduce(x: Tensor, *, reduction: str, group: str, fusion: int = 1) -> Tensor:
    """x reduced over the ranks of a group (of one: x itself), a half in float32 and rounded once.

    torchair writes a group of CPU ranks as `tag=T;rank_list=0,1,...`; it has to be that of all ranks. `fusion` says whether a
    device may join several reductions, and changes no value.
    """
    if reduction not in _REDUCTIONS:
        raise UnsupportedError(
            f"attribute reduction = {reduction!r} is not supported; expected one of {', '.join(_REDUCTIONS)}"
        )
    if fusion not in (0, 1, 2):
        raise UnsupportedError(f"attribute fusion = {fusion} is not supported; expected 0, 1 or 2")
    ranks = _ranks(group)
    if len(ranks) == 1:
        return x
    if not dist.is_initialized() or ranks != list(range(dist.get_world_size())):
        raise UnsupportedError(f"attribute group = {group!r}: only the group of all ranks is supported, with torch.distributed")
    total = wide(x).clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, _REDUCTIONS[reduction]))
    return total.to(x.dtype)


def _ranks(group: str) -> list[int]:
    found = re.search(r"(?:^|;)rank_list=(\d+(?:,\d+)*)$", group)
    if found is None:
        raise UnsupportedError(f"attribute group = {group!r} names no ranks; expected tag=...;rank_list=0,1,...")
    return [int(rank) for rank in found[1].split(",")]
