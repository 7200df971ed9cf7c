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
from .matmul import mat_mul
from .quant import quant_batch_matmul_v3, weight_quant_batch_matmul_v2
from .reduce import upcast
from .registry import HALVES, NodeContext, UnsupportedError, ge_op

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


@ge_op("MatmulAllReduce", is_trans_a=False, comm_turn=0, group_size=0, y_dtype=28, comm_quant_mode=0, comm_mode="ai_cpu")
def matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    group: str,
    reduce_op: str = "sum",
    is_trans_b: bool = False,
    antiquant_group_size: int = 0,
    context: NodeContext,
) -> Tensor:
    """The sum over the ranks of x1 [M, K] times x2 [K, N], plus bias [N] and x3 [M, N]. Each rank's is rounded before the sum.

    x2 in int8 with antiquant_scale and antiquant_offset is dequantised first, as by WeightQuantBatchMatmulV2. x1 and x2 in int8
    are scaled after the product as by QuantBatchMatmulV3, by float32 scales of columns and rows, in float16.
    """
    if reduce_op != "sum":
        raise UnsupportedError(f"attribute reduce_op = {reduce_op!r} is not supported; only 'sum' is")
    right = x2.mT if is_trans_b else x2
    if antiquant_scale is not None:
        _check_left(x1, context)
        scales = [
            each.mT if is_trans_b and each is not None and each.dim() == 2 else each
            for each in (antiquant_scale, antiquant_offset)
        ]
        y = weight_quant_batch_matmul_v2(
            x1, right, scales[0], scales[1], bias, antiquant_group_size=antiquant_group_size, inner_precise=0
        )
    elif dequant_scale is not None:
        y = _scaled_product(x1, right, bias, dequant_scale, pertoken_scale, context)
    else:
        _check_left(x1, context)
        y = mat_mul(x1, right, bias)
    y = y if x3 is None else (upcast(y) + upcast(x3)).to(y.dtype)
    members = _members(y, group, 0, context)
    if members and members.size not in FUSED_RANKS:
        raise UnsupportedError(f"attribute group = {group!r} has {members.size} ranks; expected 1, 2, 4 or 8")
    return all_reduce(y, members)


FUSED_RANKS = (2, 4, 8)


def _check_left(x1: Tensor, context: NodeContext) -> None:
    if not context.wide and x1.dtype not in HALVES:
        raise UnsupportedError(f"input x1 is {x1.dtype}; a product that is not of whole numbers takes float16 and bfloat16")


def _scaled_product(
    x1: Tensor, x2: Tensor, bias: Tensor | None, columns: Tensor, rows: Tensor | None, context: NodeContext
) -> Tensor:
    """Whole numbers times scales, in float16."""
    if columns.dtype != torch.float32 or rows is None:
        raise UnsupportedError(
            f"input dequant_scale is {columns.dtype} with{'out' if rows is None else ''} pertoken_scale; only float32 for both "
            "is supported"
        )
    return quant_batch_matmul_v3(x1, x2, columns, bias, rows, dtype=1, context=context)


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
