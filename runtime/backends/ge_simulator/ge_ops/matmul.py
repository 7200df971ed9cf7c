"""Products of matrices and convolution: float32 sums, rounded once; integers exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .reduce import upcast
from .registry import UnsupportedError, ge_op, same_dtypes


@ge_op("MatMul")
def mat_mul(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, transpose_x1: bool = False, transpose_x2: bool = False
) -> Tensor:
    """x1 [M, K] times x2 [K, N], either transposed first, plus bias [N] or [M, N]."""
    return _product(x1, x2, bias, transpose_x1, transpose_x2)


@ge_op("MatMulV2", offset_x=0)
def mat_mul_v2(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, transpose_x1: bool = False, transpose_x2: bool = False
) -> Tensor:
    """As MatMul."""
    return _product(x1, x2, bias, transpose_x1, transpose_x2)


@ge_op("BatchMatMul")
def batch_mat_mul(x1: Tensor, x2: Tensor, *, adj_x1: bool = False, adj_x2: bool = False) -> Tensor:
    """x1 [..., M, K] times x2 [..., K, N], either transposed first; the leading axes broadcast."""
    return _product(x1, x2, None, adj_x1, adj_x2)


@ge_op("BatchMatMulV2", offset_x=0)
def batch_mat_mul_v2(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, adj_x1: bool = False, adj_x2: bool = False
) -> Tensor:
    """As BatchMatMul, plus bias [N]."""
    return _product(x1, x2, bias, adj_x1, adj_x2)


def _product(x1: Tensor, x2: Tensor, bias: Tensor | None, transpose_x1: bool, transpose_x2: bool) -> Tensor:
    same_dtypes(x1=x1, x2=x2)
    left = x1.transpose(-1, -2) if transpose_x1 else x1
    right = x2.transpose(-1, -2) if transpose_x2 else x2
    if left.shape[-1] != right.shape[-2]:
        raise UnsupportedError(f"{list(left.shape)} times {list(right.shape)}: the inner sizes differ")
    product = upcast(left) @ upcast(right)
    return (product if bias is None else product + upcast(bias)).to(x1.dtype)


@ge_op("Conv2D", data_format="NCHW", offset_x=0)
def conv2d(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None = None,
    *,
    strides: list[int],
    pads: list[int],
    dilations: Sequence[int] = (1, 1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution of x [B, C, H, W] with filter [N, C / groups, h, w]; pads are (top, bottom, left, right)."""
    same_dtypes(x=x, filter=filter)
    for name, values in (("strides", strides), ("dilations", dilations)):
        if len(values) != 4 or list(values[:2]) != [1, 1]:
            raise UnsupportedError(f"attribute {name} = {values} is not supported; expected [1, 1, rows, columns]")
    top, bottom, left, right = pads
    padded = functional.pad(upcast(x), (left, right, top, bottom))
    kernel = upcast(filter)
    shift = None if bias is None else upcast(bias)
    return functional.conv2d(padded, kernel, shift, tuple(strides[2:]), 0, tuple(dilations[2:]), groups).to(x.dtype)


def exact_product(x1: Tensor, x2: Tensor) -> Tensor:
    """The product of int8 matrices, exactly: float64 has room for more than 10^11 products of two bytes. int64."""
    return (x1.double() @ x2.double()).round().to(torch.int64)
