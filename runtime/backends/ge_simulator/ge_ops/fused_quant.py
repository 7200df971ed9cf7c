"""Fused operators around the quantisation of activations. Their parts are those of norm.py, activation.py and quant.py.

With `wide` rows are float32 numbers of steps (see simulator.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .quant import quantised_rows
from .reduce import upcast
from .registry import HALVES, NodeContext, UnsupportedError, ge_op, same_dtypes

MOST_BYTES = 192 * 1024  # that DequantSwigluQuant holds of its operands
_STEPS = (torch.int32, torch.float32)


@ge_op("AddRmsNormDynamicQuant")
def add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] = (),
    dst_type: int = 2,
    context: NodeContext,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y = rms_norm(x1 + x2) * gamma + beta in float32, the sum rounded first; the rows of y times each smooth scale quantised
    (y1, y2) with their scales, and the sum: (y1, y2, sum, scale1, scale2).

    output_mask says which of the two there are; without it the first, and the second where both smooth scales are given.
    """
    _check_norm(x1, x2, gamma, context, dst_type)
    first, second = _outputs(output_mask, smooth_scale1 is not None, smooth_scale2 is not None)
    x = x1 + x2
    wide = upcast(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * upcast(gamma)
    y = y if beta is None else y + upcast(beta)
    given = ((first, smooth_scale1), (second, smooth_scale2))
    (y1, scale1), (y2, scale2) = (_smoothed_rows(y, smooth, context) if there else _nothing() for there, smooth in given)
    return y1, y2, x, scale1, scale2


def _smoothed_rows(y: Tensor, smooth: Tensor | None, context: NodeContext) -> tuple[Tensor, Tensor]:
    return quantised_rows(y if smooth is None else y * upcast(smooth), wide=context.wide)


def _nothing() -> tuple[Tensor, Tensor]:
    """An output that is masked."""
    return torch.empty(0, dtype=torch.int8), torch.empty(0)


def _outputs(mask: Sequence[bool], has_first: bool, has_second: bool) -> tuple[bool, bool]:
    """Which of both quantised outputs there are."""
    if not mask:
        if has_second and not has_first:
            raise UnsupportedError("input smooth_scale2 without smooth_scale1 needs attribute output_mask")
        return True, has_first and has_second
    if len(mask) != 2 or not any(mask) or (has_first and not mask[0]) or (has_second and not mask[1]):
        raise UnsupportedError(
            f"attribute output_mask = {list(mask)} with{'' if has_first else 'out'} smooth_scale1 and "
            f"with{'' if has_second else 'out'} smooth_scale2; expected two values, true for each scale that is given"
        )
    return bool(mask[0]), bool(mask[1])


def _check_norm(x1: Tensor, x2: Tensor, gamma: Tensor, context: NodeContext, dst_type: int) -> None:
    same_dtypes(x1=x1, x2=x2, gamma=gamma)
    if not context.wide and x1.dtype not in HALVES:
        raise UnsupportedError(f"input x1 is {x1.dtype}; the operator takes float16 and bfloat16")
    if context.dtype(dst_type) != torch.int8:
        raise UnsupportedError(f"attribute dst_type = {context.dtype(dst_type)} is not supported; only int8 is")
    if x1.dim() < 2 or x1.shape != x2.shape or tuple(gamma.shape) != (x1.shape[-1],):
        raise UnsupportedError(
            f"x1 {list(x1.shape)}, x2 {list(x2.shape)}, gamma {list(gamma.shape)} do not fit each other; expected two equal "
            "shapes of at least two axes, and gamma of the last"
        )


@ge_op("DequantSwigluQuant", round_mode="rint", activate_dim=-1, swiglu_mode=0, clamp_limit=7.0, glu_bias=1.0)
def dequant_swiglu_quant(
    x: Tensor,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    *,
    activate_left: bool = False,
    quant_mode: str = "static",
    dst_type: int = 2,
    glu_alpha: float = 1.702,
    context: NodeContext,
) -> tuple[Tensor, Tensor]:
    """x [..., 2 H] in whole numbers times the scales of its columns and rows; silu of one half times the other; those rows,
    times quant_scale [H], quantised with their scales.

    Silu is of the first half with activate_left, else of the second. x in 16-bit floats takes no scales. An int32 bias [2 H]
    joins the whole numbers, any other is added after the scales. glu_alpha belongs to another swiglu_mode than 0.
    """
    if quant_mode != "dynamic" or context.dtype(dst_type) != torch.int8:
        raise UnsupportedError(
            f"attributes quant_mode = {quant_mode!r}, dst_type = {context.dtype(dst_type)} are not supported; only 'dynamic' "
            "and int8 are"
        )
    first, second = _dequantised(x, weight_scale, activation_scale, bias).chunk(2, -1)
    gate, up = (first, second) if activate_left else (second, first)
    y = functional.silu(gate) * up
    return quantised_rows(y if quant_scale is None else y * quant_scale, wide=context.wide)


def _dequantised(x: Tensor, columns: Tensor | None, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    """x in float32. A wide x, unrounded, differs from one without scales by their presence."""
    if x.dim() < 2 or x.shape[-1] % 2:
        raise UnsupportedError(f"input x has the shape {list(x.shape)}; expected at least two axes, the last of an even size")
    if x.dtype in HALVES or columns is None:
        if x.dtype == torch.int32 or any(each is not None for each in (columns, rows, bias)):
            raise UnsupportedError(f"input x is {x.dtype}: int32 needs weight_scale, floats take no scales and no bias")
        return upcast(x)
    _check_scales(x, columns, rows)
    whole = x + bias if bias is not None and bias.dtype == torch.int32 else x
    y = whole.float() * columns.reshape(-1)
    y = y if rows is None else y * rows.reshape(*x.shape[:-1], 1)
    return y if bias is None or bias.dtype == torch.int32 else y + upcast(bias)


def _check_scales(x: Tensor, columns: Tensor, rows: Tensor | None) -> None:
    """Raise UnsupportedError for scales of another type or number, and for more than a card can hold of them."""
    count, sizes = x.shape[-1], x.shape[:-1].numel()
    if x.dtype not in _STEPS or columns.dtype != torch.float32 or (rows is not None and rows.dtype != torch.float32):
        raise UnsupportedError(f"x is {x.dtype}, weight_scale {columns.dtype}; expected int32 and scales in float32")
    if tuple(columns.shape) not in ((count,), (1, count)) or (rows is not None and rows.numel() != sizes):
        raise UnsupportedError(
            f"weight_scale {list(columns.shape)}, activation_scale {None if rows is None else list(rows.shape)} with x "
            f"{list(x.shape)}; expected [{count}] or [1, {count}], and one for each row"
        )
    held = 4 * columns.numel() + 4 * (sizes + (0 if rows is None else rows.numel())) / 40 + 10 * 4 * count
    if held >= MOST_BYTES:
        raise UnsupportedError(f"x {list(x.shape)} needs {held:.0f} bytes of a core's memory; the operator has {MOST_BYTES}")
