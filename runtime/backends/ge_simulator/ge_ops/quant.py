"""Products with quantised weights, and the quantisation of activations.

With `wide` nothing is rounded: quantised activations are float32 numbers of steps (see simulator.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import exact_product
from .reduce import upcast
from .registry import HALVES, NodeContext, UnsupportedError, ge_op, same_dtypes


@ge_op("WeightQuantBatchMatmulV2", dtype=-1)
def weight_quant_batch_matmul_v2(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    transpose_x: bool = False,
    transpose_weight: bool = False,
    antiquant_group_size: int = 0,
    inner_precise: int,
) -> Tensor:
    """x [M, K] times (weight [K, N] + offset) * scale, plus bias [N]; weight in int8, or in int32 that
    hold eight numbers of 4 bits each, the first in the lowest bits: along N, or along K where the weight is transposed.

    Scale and offset: [1] for all, [N] or [1, N] per column, [K / g, N] for groups of g rows (antiquant_group_size). The weight
    is rounded to x's dtype before the product, since the cube unit takes nothing wider; inner_precise (0 or 1) is about speed.
    """
    if weight.dtype not in (torch.int8, torch.int32):
        raise UnsupportedError(f"input weight is {weight.dtype}; only int8 and int32 are supported")
    if inner_precise not in (0, 1):
        raise UnsupportedError(f"attribute inner_precise = {inner_precise} is not supported; expected 0 or 1")
    same_dtypes(x=x, antiquant_scale=antiquant_scale)
    left = x.T if transpose_x else x
    right = weight.T if transpose_weight else weight
    _check_group(antiquant_group_size, left)
    right = _unpack_int4(right, left.shape[1]) if right.dtype == torch.int32 else right
    scale, offset = antiquant_scale, antiquant_offset
    if transpose_weight:  # then scale and offset are transposed too
        scale, offset = (each.T if each is not None and each.dim() == 2 else each for each in (scale, offset))
    assert scale is not None
    wide = right.float()  # a copy, which is changed in place: a weight of a large vocabulary takes hundreds of megabytes
    if offset is not None:
        wide += upcast(_row_values(offset, right, antiquant_group_size, "antiquant_offset"))
    wide *= upcast(_row_values(scale, right, antiquant_group_size, "antiquant_scale"))
    product = upcast(left) @ upcast(wide.to(x.dtype))
    return (product if bias is None else product + upcast(bias)).to(x.dtype)


def _check_group(group: int, x: Tensor) -> None:
    """Raise UnsupportedError for a shape of x [M, K] or a group size that a card refuses."""
    if x.dim() != 2:
        raise UnsupportedError(f"input x has the shape {list(x.shape)}; expected two axes")
    if group and (group % 32 or not 0 < group < x.shape[1]):
        raise UnsupportedError(
            f"attribute antiquant_group_size = {group} with {x.shape[1]} input features; expected 0, or a multiple of 32 below "
            "that number"
        )


def _unpack_int4(weight: Tensor, rows: int) -> Tensor:
    """int32 [K / 8, N] or [K, N / 8] -> int8 [K, N], K being `rows`."""
    packed = weight.T if len(weight) * 8 == rows else weight  # numbers lie along the last axis
    if rows not in (len(weight), 8 * len(weight)):
        shape = list(weight.shape)
        raise UnsupportedError(f"input weight has the shape {shape}; expected {rows} or {rows // 8} rows of int32")
    numbers = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    weight_int8 = ((numbers ^ 8) - 8).to(torch.int8).flatten(1)
    return weight_int8.T if packed is not weight else weight_int8


def _row_values(values: Tensor, weight: Tensor, group: int, name: str) -> Tensor:
    """Scales or offsets in a shape that broadcasts with weight [K, N]."""
    rows, columns = weight.shape
    if group == 0 and tuple(values.shape) in ((1,), (columns,), (1, columns)):
        return values
    if group > 0 and tuple(values.shape) == (-(-rows // group), columns):
        return values.repeat_interleave(group, 0)[:rows]
    expected = f"[{-(-rows // group)}, {columns}]" if group else f"[1], [{columns}] or [1, {columns}]"
    raise UnsupportedError(f"input {name} has the shape {list(values.shape)}; expected {expected} for groups of {group}")


@ge_op("QuantBatchMatmulV3")
def quant_batch_matmul_v3(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    dtype: int,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    context: NodeContext,
) -> Tensor:
    """x1 [..., M, K] times x2 [..., K, N], both int8, times scale ([1] or [N]) and pertoken_scale [M], plus bias [N].

    An int32 bias joins the integers, which add up exactly; any other is added after the scales. Scales are float32 or bfloat16:
    those in 64 bits, which the device's float16 path packs, are refused. An output in int32 is the whole numbers themselves,
    without any scale.
    """
    if x1.dtype != (torch.float32 if context.wide and x1.is_floating_point() else torch.int8) or x2.dtype != torch.int8:
        raise UnsupportedError(f"operands are {x1.dtype} and {x2.dtype}; only int8 is supported")
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"input scale is {scale.dtype}; only float32 and bfloat16 are supported")
    _check_output_dtype(scale, bias, context, dtype)
    left, right = x1.mT if transpose_x1 else x1, x2.mT if transpose_x2 else x2
    total = left @ right.float() if left.is_floating_point() else exact_product(left, right)
    if bias is not None and bias.dtype == torch.int32:
        total, bias = total + bias, None
    if context.dtype(dtype) == torch.int32:
        if pertoken_scale is not None:
            raise UnsupportedError("input pertoken_scale: an output in int32 takes none")
        return total.int() if total.dtype == torch.int64 else total  # wide, the sum of what is not rounded is no whole number
    y = total.float() * upcast(scale)
    y = y if pertoken_scale is None else y * pertoken_scale[..., None]
    return (y if bias is None else y + upcast(bias)).to(context.dtype(dtype))


def _check_output_dtype(scale: Tensor, bias: Tensor | None, context: NodeContext, dtype: int) -> None:
    """Raise UnsupportedError for dtypes that a card refuses: an output in float16 needs a scale in float32, and one in 16 bits
    a bias of its own type, in float32 or in int32."""
    out = context.dtype(dtype)
    if out == torch.float16 and scale.dtype != torch.float32:
        raise UnsupportedError(f"input scale is {scale.dtype}; an output in float16 takes float32")
    if out in HALVES and bias is not None and bias.dtype in HALVES and bias.dtype != out:
        raise UnsupportedError(f"input bias is {bias.dtype}; an output in {out} takes {out}, float32 or int32")


@ge_op("DynamicQuant")
def dynamic_quant(
    x: Tensor, smooth_scales: Tensor | None = None, *, dst_type: int = 2, context: NodeContext
) -> tuple[Tensor, Tensor]:
    """Each row of x in int8, and its scale max|x| / 127 in float32; smooth_scales multiply the columns first.

    Rounds to the nearest, halves to even, unless it is wide. A row of zeros has the scale 0.
    """
    if context.dtype(dst_type) != torch.int8:
        raise UnsupportedError(f"attribute dst_type = {context.dtype(dst_type)} is not supported; only int8 is")
    return quantised_rows(upcast(x) if smooth_scales is None else upcast(x) * upcast(smooth_scales), wide=context.wide)


def quantised_rows(y: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """The rows of y in int8, and their scales; rounded unless `wide`."""
    scale = y.abs().amax(-1) / 127
    steps = y / scale.where(scale > 0, 1)[..., None]
    return steps if wide else steps.round().clamp(-128, 127).to(torch.int8), scale


@ge_op("Quantize")
def quantize(x: Tensor, scales: Tensor, zero_points: Tensor | None = None, *, dtype: str, axis: int = 1) -> Tensor:
    """x / scales + zero_points in int8, rounded to the nearest, halves to even; what is beyond -128 or 127 is cut off there.

    Scales are of the places along `axis`: as many as there are, or one, with as many axes as x, the others of size 1. They come
    in float32, or in bfloat16 with x. Rounds with `wide`, too: caches are whole numbers in any case.
    """
    if dtype != "torch.qint8":
        raise UnsupportedError(f"attribute dtype = {dtype!r} is not supported; expected 'torch.qint8'")
    if scales.dtype != torch.float32 and not (scales.dtype == x.dtype == torch.bfloat16):
        raise UnsupportedError(f"input scales is {scales.dtype} for x in {x.dtype}; expected float32, or bfloat16 for bfloat16")
    expected = [x.shape[i] if i == axis % x.dim() else 1 for i in range(x.dim())]
    if list(scales.shape) not in (expected, [1] * x.dim()) or (zero_points is not None and zero_points.shape != scales.shape):
        raise UnsupportedError(f"input scales has the shape {list(scales.shape)} for x {list(x.shape)}; expected {expected}")
    steps = upcast(x) / upcast(scales) + (0 if zero_points is None else upcast(zero_points))
    return steps.round().clamp(-128, 127).to(torch.int8)
