"""Operators that pick values by index, or give the indices of values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reduce import upcast
from .registry import NodeContext, UnsupportedError, ge_op, number, same_dtypes


@ge_op("GatherV2", batch_dims=0, is_preprocessed=False)
def gather_v2(x: Tensor, indices: Tensor, axis: Tensor, *, negative_index_support: bool = False) -> Tensor:
    """Parts of x along an axis: x [..., N, ...], indices of any shape, which takes the place of that axis.

    An index out of range is an error here; a device reads some other memory.
    """
    return _gather(x, indices, int(number(axis, "axis")), negative_index_support)


@ge_op("Gather", validate_indices=True, batch_dims=0, is_preprocessed=False)
def gather(x: Tensor, indices: Tensor, *, negative_index_support: bool = False) -> Tensor:
    """As GatherV2 along the first axis."""
    return _gather(x, indices, 0, negative_index_support)


def _gather(x: Tensor, indices: Tensor, axis: int, negative: bool) -> Tensor:
    axis %= x.dim()
    size = x.shape[axis]
    _check_range(indices, -size if negative else 0, size)
    flat = indices.reshape(-1).long()
    flat = torch.where(flat < 0, flat + size, flat)
    return x.index_select(axis, flat).reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@ge_op("GatherElements")
def gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    """One value of x along an axis for every place of index."""
    _check_range(index, 0, x.shape[dim])
    return x.gather(dim, index.long())


@ge_op("ScatterElements")
def scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """A copy of data with one value of updates at every place of indices along an axis: assigned, added or multiplied.

    data and indices have as many axes, indices and updates one shape. An index that is assigned twice is an error here; on a
    device either value may stay. Sums and products are in float32, rounded once.
    """
    same_dtypes(data=data, updates=updates)
    reductions = {"none": None, "add": "sum", "mul": "prod"}
    if reduction not in reductions:
        raise UnsupportedError(f"attribute reduction = {reduction!r} is not supported; expected none, add or mul")
    if indices.shape != updates.shape or indices.dim() != data.dim():
        shapes = f"data {list(data.shape)}, indices {list(indices.shape)}, updates {list(updates.shape)}"
        raise UnsupportedError(f"{shapes} do not fit each other")
    places = indices.long()
    _check_range(places, 0, data.shape[axis])
    result = upcast(data).clone()
    if method := reductions[reduction]:
        return result.scatter_reduce(axis, places, upcast(updates), method).to(data.dtype)
    if torch.zeros(data.shape).scatter_add(axis, places, torch.ones(places.shape)).gt(1).any():
        raise UnsupportedError("input indices names a place twice; which value stays is left open")
    return result.scatter(axis, places, upcast(updates)).to(data.dtype)


@ge_op("IndexByTensor")
def index_by_tensor(x: Tensor, indices: list[Tensor], *, indices_mask: Sequence[int] = ()) -> Tensor:
    """x[i, j, ...] with broadcast index tensors at the axes that indices_mask marks with 1, and whole axes elsewhere."""
    remaining = iter(indices)
    index = tuple(next(remaining).long() if marked else slice(None) for marked in indices_mask)
    for each, size in zip(index, x.shape, strict=False):
        if isinstance(each, Tensor):
            _check_range(each, -size, size)
    return x[index]


def _check_range(indices: Tensor, low: int, high: int) -> None:
    """Indices have to be from `low` to below `high`."""
    if indices.numel() and (int(indices.min()) < low or int(indices.max()) >= high):
        invalid = next(int(each) for each in indices.reshape(-1) if not low <= int(each) < high)
        raise UnsupportedError(f"index {invalid} is out of range; expected {low} to {high - 1}")


@ge_op("ArgMaxV2")
def arg_max_v2(x: Tensor, dimension: Tensor, *, dtype: str = "int64", context: NodeContext) -> Tensor:
    """The index of the largest value along an axis, the first of equals."""
    return x.argmax(int(number(dimension, "dimension"))).to(context.dtype(dtype))


@ge_op("ArgMaxWithValue")
def arg_max_with_value(x: Tensor, *, dimension: int, keep_dims: bool = False) -> tuple[Tensor, Tensor]:
    """The index (int32) of the largest value along an axis, and the value."""
    index = x.argmax(dimension, keepdim=True)
    value = x.gather(dimension, index)
    index = index.int()
    return (index, value) if keep_dims else (index.squeeze(dimension), value.squeeze(dimension))


@ge_op("TopKV2", "TopK", sort_policy=1)
def top_k(x: Tensor, k: Tensor, *, sorted: bool = True, dim: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) values along an axis in order, and their indices; the first of equals comes first.

    `sorted` false leaves the order open, so a sorted answer is right for it too. torchair always asks for sort_policy 1.
    """
    count = int(number(k, "k"))
    if not 0 <= count <= x.shape[dim]:
        raise UnsupportedError(f"input k = {count}, but axis {dim} has {x.shape[dim]} values")
    values, indices = x.sort(dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, count), indices.narrow(dim, 0, count).int()
