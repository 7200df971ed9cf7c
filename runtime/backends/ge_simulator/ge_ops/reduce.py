"""Reductions over axes, computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .registry import HALVES, NodeContext, ge_op, integers, number


def upcast(x: Tensor) -> Tensor:
    """A 16-bit float tensor as float32; any other as it is."""
    return x.float() if x.dtype in HALVES else x


@ge_op("ReduceSum")
def reduce_sum(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The sum over axes; over none, x itself."""
    return _sum(x, integers(axes), keep_dims)


@ge_op("ReduceSumD")
def reduce_sum_d(x: Tensor, *, axes: list[int], keep_dims: bool = False) -> Tensor:
    """As ReduceSum."""
    return _sum(x, axes, keep_dims)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return upcast(x).sum(axes, keepdim=keep).to(x.dtype) if axes else x


@ge_op("Cumsum")
def cumsum(x: Tensor, axis: Tensor, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums along an axis up to each place, without its own value where `exclusive`; from the end where `reverse`."""
    return _cumsum(x, int(number(axis, "axis")), exclusive, reverse)


@ge_op("CumsumD")
def cumsum_d(x: Tensor, *, axis: int, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """As Cumsum."""
    return _cumsum(x, axis, exclusive, reverse)


def _cumsum(x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    y = upcast(x).flip(axis) if reverse else upcast(x)
    total = y.cumsum(axis, dtype=y.dtype)
    if exclusive:
        total = torch.cat((torch.zeros_like(total.narrow(axis, 0, 1)), total), axis).narrow(axis, 0, total.shape[axis])
    return (total.flip(axis) if reverse else total).to(x.dtype)


@ge_op("ReduceMean", noop_with_empty_axes=True)
def reduce_mean(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The mean over axes; over none, x itself."""
    return _mean(x, integers(axes), keep_dims)


@ge_op("ReduceMeanD", noop_with_empty_axes=True)
def reduce_mean_d(x: Tensor, *, axes: list[int], keep_dims: bool = False) -> Tensor:
    """As ReduceMean."""
    return _mean(x, axes, keep_dims)


@ge_op("ReduceMeanWithCast", noop_with_empty_axes=True)
def reduce_mean_with_cast(x: Tensor, axes: Tensor, *, keep_dims: bool = False, dtype: str, context: NodeContext) -> Tensor:
    """As ReduceMean, the result in another dtype."""
    return _mean(x.to(context.dtype(dtype)), integers(axes), keep_dims)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return upcast(x).mean(axes, keepdim=keep).to(x.dtype) if axes else x


@ge_op("ReduceMax")
def reduce_max(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The largest value over axes."""
    return x.amax(integers(axes), keepdim=keep_dims)


@ge_op("ReduceMin")
def reduce_min(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The smallest value over axes."""
    return x.amin(integers(axes), keepdim=keep_dims)


@ge_op("ReduceAll")
def reduce_all(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """Whether all hold."""
    return _logical(x, integers(axes), keep_dims, torch.all)


@ge_op("ReduceAny")
def reduce_any(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """Whether any holds."""
    return _logical(x, integers(axes), keep_dims, torch.any)


def _logical(x: Tensor, axes: list[int], keep: bool, function: Callable[..., Tensor]) -> Tensor:
    return function(x, tuple(axes), keepdim=keep) if axes else x
