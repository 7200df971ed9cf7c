"""Where ranks meet."""

from __future__ import annotations

from torch import Tensor

from ...runtime.backends.ascend.process_groups import group_of_all
from .operators import c10d


def all_reduce(x: Tensor, ranks: int) -> Tensor:
    """HcomAllReduce."""
    return c10d.wait_tensor.default(c10d.all_reduce.default(x, "sum", group_of_all(ranks)))


def all_gather(x: Tensor, ranks: int) -> Tensor:
    """HcomAllGather, which joins along the first axis: one transposition after it brings the parts of a row together.

    A single row needs none.
    """
    rows = x.reshape(-1, x.shape[-1])  # [M, C]
    joined = c10d.wait_tensor.default(c10d.all_gather_into_tensor.default(rows, ranks, group_of_all(ranks)))  # [ranks * M, C]
    if len(rows) > 1:
        joined = joined.unflatten(0, (ranks, -1)).transpose(0, 1)  # [M, ranks, C]
    return joined.reshape(*x.shape[:-1], ranks * x.shape[-1])
