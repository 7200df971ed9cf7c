"""The ops that fusions.py puts in place of several of the vocabulary, and their lowerings: one operator of Ascend for each.

They are registered with torch under `staticvl_ascend::`, so that a trace holds them whole and a graph file names nothing of
ours. Their shapes are those of their lowerings. M rows, C features, N out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ...runtime.backends.ascend.process_groups import name_of_all
from . import attention, collectives, paged_attention
from .operators import npu
from .products import TYPE_NUMBERS

DYNAMIC = 1  # quant_mode of npu_dequant_swiglu_quant: a scale for each row, computed by the operator
INT32 = 3  # torch's own number of the dtype

NAMESPACE = "staticvl_ascend"
_LOWERINGS: dict[OpOverload, Callable[..., Any]] = {}


def lowerings() -> dict[OpOverload, Callable[..., Any]]:
    """Every op with its lowering, for torchair's `custom_decompositions`."""
    return dict(_LOWERINGS)


def _op(lowering: Callable[..., Any], fake: Callable[..., Any] | None = None) -> OpOverload:
    """Register an op of the lowering's name and shapes. `fake` computes the shapes where the lowering cannot."""
    op = torch.library.custom_op(f"{NAMESPACE}::{lowering.__name__}", mutates_args=())(lowering)
    op.register_fake(fake or lowering)
    overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), lowering.__name__).default
    _LOWERINGS[overload] = lowering
    return overload


@_op
def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """AddRmsNorm: rms_norm(x + y), and x + y."""
    normed, _, total = npu.npu_add_rms_norm.default(x, y, weight, eps)
    return normed, total


@_op
def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """DynamicQuant of the rows of x [..., C]: [M, C] int8, and the scale of each row [M] float32."""
    rows, scales = npu.npu_dynamic_quant.default(x.reshape(-1, x.shape[-1]))
    return rows, scales


@_op
def rms_norm_quantised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RmsNorm and DynamicQuant with nothing between them."""
    rows, scales = npu.npu_dynamic_quant.default(npu.npu_rms_norm.default(x.reshape(-1, x.shape[-1]), weight, eps)[0])
    return rows, scales


@_op
def add_rms_norm_quantised(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """AddRmsNormDynamicQuant: the rows of rms_norm(x + y) quantised, their scales, and x + y."""
    rows, _, total, scales, _ = npu.npu_add_rms_norm_dynamic_quant.default(x, y, weight, epsilon=eps, output_mask=[True, False])
    return rows.reshape(-1, x.shape[-1]), scales.reshape(-1), total


def _product_like(
    rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, like: Tensor, shape: Sequence[int]
) -> Tensor:
    """The shape of product_of_rows. In traces of vision graphs `like` is float32, as pixels are: products bring them to 16 bits
    only when they are lowered, and no product of rows has a result in float32."""
    return like.new_empty(shape)


def _sum_like(
    rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, like: Tensor, shape: Sequence[int], ranks: int
) -> Tensor:
    """The shape of product_of_rows_reduced, likewise."""
    return like.new_empty(shape)


@partial(_op, fake=_product_like)
def product_of_rows(
    rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, like: Tensor, shape: Sequence[int]
) -> Tensor:
    """QuantBatchMatmul of rows that are quantised already, in the type of `like` and in `shape`."""
    return product_of_rows_in(rows, row_scales, qweight, scales, bias, like, shape)


def product_of_rows_in(
    rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, like: Tensor, shape: Sequence[int]
) -> Tensor:
    number = TYPE_NUMBERS[like.dtype]
    y = npu.npu_quant_matmul.default(rows, qweight, scales, pertoken_scale=row_scales, bias=bias, output_dtype=number)
    return y.reshape(shape)


@_op
def swiglu_quantised(rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The product of gate and up left in whole numbers, and DequantSwigluQuant: the rows of silu(gate) * up quantised."""
    total = npu.npu_quant_matmul.default(rows, qweight, scales, output_dtype=INT32)
    y, y_scales = npu.npu_dequant_swiglu_quant.default(
        total, weight_scale=scales, activation_scale=row_scales[:, None], activate_left=True, quant_mode=DYNAMIC
    )
    return y, y_scales


@_op
def product_reduced(x: Tensor, weight: Tensor, ranks: int) -> Tensor:
    """MatmulAllReduce: the sum over the ranks of each one's x [..., C] times its weight [N, C] transposed."""
    rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
    y = npu.npu_mm_all_reduce_base.default(rows, weight.t(), name_of_all(ranks))
    return y.reshape(*x.shape[:-1], weight.shape[0])


@_op
def grouped_product_reduced(x: Tensor, qweight: Tensor, scales: Tensor, offsets: Tensor | None, ranks: int) -> Tensor:
    """The same of a weight in 8 bits, [N, blocks, block] or [N, K] in one block, with scales and offsets [N, blocks] (see
    products.linear_w8)."""
    blocks = scales.shape[1]
    y = npu.npu_mm_all_reduce_base.default(
        x.reshape(-1, x.shape[-1]),
        qweight.flatten(1).t(),
        name_of_all(ranks),
        antiquant_scale=scales.t(),
        antiquant_offset=None if offsets is None else offsets.t(),
        antiquant_group_size=x.shape[-1] // blocks if blocks > 1 else 0,
    )
    return y.reshape(*x.shape[:-1], -1)


@partial(_op, fake=_sum_like)
def product_of_rows_reduced(
    rows: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, like: Tensor, shape: Sequence[int], ranks: int
) -> Tensor:
    """The same of quantised rows, in float16. In bfloat16 the operator wants scales that are rounded to it: there product and
    sum stay apart."""
    if like.dtype != torch.float16:
        return collectives.all_reduce(product_of_rows_in(rows, row_scales, qweight, scales, None, like, shape), ranks)
    y = npu.npu_mm_all_reduce_base.default(rows, qweight, name_of_all(ranks), dequant_scale=scales, pertoken_scale=row_scales)
    return y.reshape(shape)


@_op
def rope_of_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """ApplyRotaryPosEmb of queries [B, T, H*D] and keys [B, T, K*D] in its layout BSND; cos and sin [B, T, D]."""
    b, t, d = cos.shape
    cos, sin = (each.to(q.dtype)[:, :, None] for each in (cos, sin))
    turned = npu.npu_apply_rotary_pos_emb.default(q.view(b, t, -1, d), k.view(b, t, -1, d), cos, sin, "BSND", "half")
    return turned[0].view(q.shape), turned[1].view(k.shape)


@_op
def attention_of_width(q: Tensor, k: Tensor, v: Tensor, heads: int, width: int) -> Tensor:
    """The op `attention` over heads that are filled up, of the true `width`."""
    return attention.whole_attention(q, k, v, heads, width)


@_op
def padded_attention_of_width(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int, width: int) -> Tensor:
    """The op `padded_attention` over such heads."""
    return attention.whole_padded_attention(q, k, v, padding, heads, width)


@_op
def int8_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    heads: int,
    k_steps: Tensor,
    v_steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name, with the scales in float32 as tensors of their own ([K*D]): none is computed in the graph."""
    return attention.over_int8_caches(q, (k, v), (k_cache, v_cache), (k_scale, v_scale), (k_steps, v_steps), lengths, heads)


@_op
def int8_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
    k_steps: Tensor,
    v_steps: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name, likewise."""
    caches, scales, places = (k_cache, v_cache), (k_scale, v_scale), (lengths, block_table, slot_mapping)
    return paged_attention.over_int8_pages(q, (k, v), caches, scales, (k_steps, v_steps), places, heads)
