"""Operators that move values and change none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .registry import NodeContext, UnsupportedError, ge_op, integers, number


@ge_op("Identity")
def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


@ge_op("TensorMove")
def tensor_move(x: Tensor) -> Tensor:
    """A copy of x, which others may write."""
    return x.clone()


@ge_op("Reshape", axis=0, num_axes=-1)
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """x in another shape; one size may be -1."""
    return x.reshape(integers(shape))


@ge_op("Transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """x with its axes in the order of perm."""
    return x.permute(integers(perm)).contiguous()


@ge_op("Unsqueeze")
def unsqueeze(x: Tensor, *, axes: Sequence[int] = ()) -> Tensor:
    """x with axes of size 1 at the places `axes` of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@ge_op("ExpandDims")
def expand_dims(x: Tensor, axis: Tensor) -> Tensor:
    """x with one more axis of size 1, at the place `axis` of the result."""
    return x.unsqueeze(int(number(axis, "axis")))


@ge_op("Tril")
def tril(x: Tensor, *, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros above a diagonal, the main one (0), one above it (1) or below it (-1), ..."""
    return x.tril(diagonal)


@ge_op("Triu")
def triu(x: Tensor, *, diagonal: int = 0) -> Tensor:
    """The last two axes with zeros below a diagonal."""
    return x.triu(diagonal)


@ge_op("Squeeze")
def squeeze(x: Tensor, *, axis: Sequence[int] = ()) -> Tensor:
    """x without the axes `axis`, which have size 1; without all such axes where the list is empty."""
    invalid = [i for i in axis if x.shape[i] != 1]
    if invalid:
        raise UnsupportedError(f"attribute axis = {axis}: axis {invalid[0]} of {list(x.shape)} is not of size 1")
    return x.squeeze(tuple(axis)) if axis else x.squeeze()


@ge_op("FlattenV2")
def flatten(x: Tensor, *, axis: int = 1, end_axis: int = -1) -> Tensor:
    """x with the axes from `axis` to `end_axis` made one."""
    return x.flatten(axis, end_axis)


@ge_op("ConcatV2")
def concat_v2(x: list[Tensor], concat_dim: Tensor, *, N: int) -> Tensor:  # noqa: N803  the attribute's name
    """The N operands one after another along an axis."""
    return _concatenate(x, int(number(concat_dim, "concat_dim")), N)


@ge_op("ConcatD")
def concat_d(x: list[Tensor], *, concat_dim: int, N: int) -> Tensor:  # noqa: N803
    """As ConcatV2."""
    return _concatenate(x, concat_dim, N)


def _concatenate(parts: list[Tensor], axis: int, count: int) -> Tensor:
    _check_count(parts, count)
    return torch.cat(parts, axis)


@ge_op("Pack")
def pack(x: list[Tensor], *, N: int, axis: int = 0) -> Tensor:  # noqa: N803
    """The N operands along a new axis."""
    _check_count(x, N)
    return torch.stack(x, axis)


def _check_count(parts: list[Tensor], count: int) -> None:
    if len(parts) != count:
        raise UnsupportedError(f"attribute N = {count}, but {len(parts)} operands")


@ge_op("Unpack")
def unpack(x: Tensor, *, num: int, axis: int = 0) -> list[Tensor]:
    """The num parts of x along an axis, which goes."""
    if x.shape[axis] != num:
        raise UnsupportedError(f"attribute num = {num}, but the axis has {x.shape[axis]} parts")
    return list(x.unbind(axis))


@ge_op("Split")
def split(split_dim: Tensor, x: Tensor, *, num_split: int) -> list[Tensor]:
    """x in num_split equal parts."""
    return _equal_parts(x, int(number(split_dim, "split_dim")), num_split)


@ge_op("SplitD")
def split_d(x: Tensor, *, split_dim: int, num_split: int) -> list[Tensor]:
    """As Split."""
    return _equal_parts(x, split_dim, num_split)


def _equal_parts(x: Tensor, axis: int, count: int) -> list[Tensor]:
    if x.shape[axis] % count:
        raise UnsupportedError(f"attribute num_split = {count} does not divide axis {axis} of {list(x.shape)}")
    return list(x.chunk(count, axis))


@ge_op("SplitV")
def split_v(x: Tensor, size_splits: Tensor, split_dim: Tensor, *, num_split: int) -> list[Tensor]:
    """x in parts of the given sizes."""
    return _parts(x, integers(size_splits), int(number(split_dim, "split_dim")), num_split)


@ge_op("SplitVD")
def split_vd(x: Tensor, *, size_splits: list[int], split_dim: int, num_split: int) -> list[Tensor]:
    """As SplitV."""
    return _parts(x, size_splits, split_dim, num_split)


def _parts(x: Tensor, sizes: list[int], axis: int, count: int) -> list[Tensor]:
    if -1 in sizes:  # the one size that follows from the others
        rest = x.shape[axis] - sum(size for size in sizes if size >= 0)
        sizes = [rest if size == -1 else size for size in sizes]
    if len(sizes) != count:
        raise UnsupportedError(f"attribute num_split = {count}, but {len(sizes)} sizes")
    return list(x.split(sizes, axis))


@ge_op("StridedSlice", ellipsis_mask=0, new_axis_mask=0)
def strided_slice(
    x: Tensor, begin: Tensor, end: Tensor, strides: Tensor, *, begin_mask: int = 0, end_mask: int = 0, shrink_axis_mask: int = 0
) -> Tensor:
    """x[begin:end:strides] over its first axes; a bit of a mask leaves a bound out, or takes one part and drops its axis."""
    return _slice(x, begin, end, None, strides, (begin_mask, end_mask, shrink_axis_mask))


@ge_op("StridedSliceV2", ellipsis_mask=0, new_axis_mask=0)
def strided_slice_v2(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
    *,
    begin_mask: int = 0,
    end_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    """As StridedSlice, over the axes that are named."""
    return _slice(x, begin, end, axes, strides, (begin_mask, end_mask, shrink_axis_mask))


def _slice(
    x: Tensor, begin: Tensor, end: Tensor, axes: Tensor | None, strides: Tensor | None, masks: tuple[int, int, int]
) -> Tensor:
    begins, ends = integers(begin), integers(end)
    places = list(range(len(begins))) if axes is None else [axis % x.dim() for axis in integers(axes)]
    steps = [1] * len(begins) if strides is None else integers(strides)
    if min(steps, default=1) < 1:
        raise UnsupportedError(f"input strides = {steps}; only forward slices are supported")
    index: list[slice | int] = [slice(None)] * x.dim()
    for i, axis in enumerate(places):
        no_begin, no_end, one = (bool(mask >> i & 1) for mask in masks)
        index[axis] = begins[i] if one else slice(None if no_begin else begins[i], None if no_end else ends[i], steps[i])
    return x[tuple(index)]


@ge_op("Slice")
def slice_(x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    """`size` parts of x from `offsets` on, per axis; a size of -1 goes to the end."""
    for axis, (start, count) in enumerate(zip(integers(offsets), integers(size), strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


@ge_op("Tile")
def tile(x: Tensor, multiples: Tensor) -> Tensor:
    """x repeated along each axis."""
    return x.repeat(integers(multiples))


@ge_op("TileD")
def tile_d(x: Tensor, *, multiples: list[int]) -> Tensor:
    """As Tile."""
    return x.repeat(multiples)


@ge_op("BroadcastTo")
def broadcast_to(x: Tensor, shape: Tensor) -> Tensor:
    """x in a larger shape; -1 keeps a size."""
    return x.expand(integers(shape))


@ge_op("Expand")
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """x in the shape that it and `shape` broadcast to."""
    return x.expand(torch.broadcast_shapes(x.shape, integers(shape)))


@ge_op("Pad")
def pad(x: Tensor, paddings: Tensor) -> Tensor:
    """x with zeros around it: paddings [rank, 2], before and after each axis."""
    return _pad(x, integers(paddings), 0)


@ge_op("PadV2")
def pad_v2(x: Tensor, paddings: Tensor, constant_values: Tensor) -> Tensor:
    """As Pad, with another value than zero."""
    return _pad(x, integers(paddings), number(constant_values, "constant_values"))


@ge_op("PadV3", mode="constant", paddings_contiguous=True)
def pad_v3(x: Tensor, paddings: Tensor, constant_values: Tensor | None = None) -> Tensor:
    """As PadV2."""
    return _pad(x, integers(paddings), 0 if constant_values is None else number(constant_values, "constant_values"))


def _pad(x: Tensor, paddings: list[int], value: float) -> Tensor:
    pairs = list(zip(paddings[::2], paddings[1::2], strict=True))
    if len(pairs) != x.dim():
        raise UnsupportedError(f"input paddings has {len(pairs)} pairs for {x.dim()} axes")
    # torch counts from the last axis.
    return torch.nn.functional.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


@ge_op("Fill")
def fill(dims: Tensor, value: Tensor) -> Tensor:
    """A tensor of shape `dims`, all of one value."""
    return torch.full(integers(dims), number(value, "value"), dtype=value.dtype)


@ge_op("FillD")
def fill_d(value: Tensor, *, dims: list[int]) -> Tensor:
    """As Fill."""
    return torch.full(dims, number(value, "value"), dtype=value.dtype)


@ge_op("Range", is_closed=False)
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """start, start + delta, ... below limit."""
    first, end, step = (number(x, name) for x, name in ((start, "start"), (limit, "limit"), (delta, "delta")))
    count = max(0, math.ceil((end - first) / step))
    return (torch.arange(count, dtype=torch.float64) * step + first).to(start.dtype)


@ge_op("Shape")
def shape_(x: Tensor, *, dtype: int = 3, context: NodeContext) -> Tensor:
    """The sizes of x."""
    return torch.tensor(x.shape, dtype=context.dtype(dtype))
