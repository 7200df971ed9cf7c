"""Operators that write in place. Their first input is the tensor that they write, and their first output is the same memory."""

from __future__ import annotations

from torch import Tensor

from .registry import UnsupportedError, ge_op, same_dtypes

IN_PLACE = ("Scatter", "ScatterUpdate", "Assign")


@ge_op("Scatter", reduce="update")
def scatter(var: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """Write the T rows of each updates[b] into var[b] from row indices[b] on: the KV cache's write.

    var [B, ..., S, ...], indices [B] (int32 or int64), updates as var with T in place of S at `axis`, which is not the first.
    Rows out of range are an error here; a device would write elsewhere.
    """
    same_dtypes(var=var, updates=updates)
    axis %= var.dim()
    expected = [*var.shape[:axis], updates.shape[axis], *var.shape[axis + 1 :]]
    if axis == 0 or list(updates.shape) != expected or tuple(indices.shape) != (var.shape[0],):
        raise UnsupportedError(
            f"axis {axis} of var {list(var.shape)} with indices {list(indices.shape)} and updates {list(updates.shape)} "
            "is not supported; expected indices [B] and updates that differ from var in one later axis"
        )
    starts, count = [int(start) for start in indices], updates.shape[axis]
    for b, start in enumerate(starts):
        if not 0 <= start <= var.shape[axis] - count:
            raise UnsupportedError(f"rows {start} to {start + count - 1} of row {b} of the batch; var has {var.shape[axis]}")
    for b, start in enumerate(starts):
        var[b].narrow(axis - 1, start, count).copy_(updates[b])
    return var


@ge_op("ScatterUpdate", use_locking=False)
def scatter_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Replace whole parts of var [N, ...]: var[indices] = updates."""
    same_dtypes(var=var, updates=updates)
    rows = indices.reshape(-1).long()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < var.shape[0]:
        raise UnsupportedError(f"indices {rows.tolist()} are out of range; var has {var.shape[0]} parts")
    var[rows] = updates.reshape(-1, *var.shape[1:])
    return var


@ge_op("Assign", validate_shape=True, use_locking=False)
def assign(ref: Tensor, value: Tensor) -> Tensor:
    """Write value over ref."""
    same_dtypes(ref=ref, value=value)
    if ref.shape != value.shape:
        raise UnsupportedError(f"value {list(value.shape)} does not fit ref {list(ref.shape)}")
    return ref.copy_(value)
