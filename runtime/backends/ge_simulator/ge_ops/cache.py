"""Operators that write in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import UnsupportedError, ge_op, same_dtypes

# The places of the inputs that an operator writes. Its outputs, in the same order, are the same memory.
IN_PLACE = {"Scatter": (0,), "ScatterUpdate": (0,), "Assign": (0,), "ScatterPaKvCache": (1, 4)}
PADDING = 0  # the page that rows of padding are written to


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


@ge_op("ScatterPaKvCache", scatter_mode="None", strides=[1, 1], offsets=[0, 0])
def scatter_pages(
    key: Tensor, key_cache: Tensor, slot_mapping: Tensor, value: Tensor, value_cache: Tensor, *, cache_mode: str = "Norm"
) -> tuple[Tensor, Tensor]:
    """Write token t of key and value [T, K, D] at place slot_mapping[t] % P of page slot_mapping[t] // P, in key_cache and
    value_cache [Z, P, K, D].

    Places (int32 or int64) out of range are an error here. A device promises nothing for two tokens of one place: an error, but
    in the page of padding, which nothing reads.
    """
    if cache_mode != "Norm":
        raise UnsupportedError(f"attribute cache_mode = {cache_mode!r} is not supported; expected 'Norm'")
    same_dtypes(key=key, key_cache=key_cache)
    same_dtypes(value=value, value_cache=value_cache)
    places = _slots(slot_mapping, key, key_cache)
    for new, cache in ((key, key_cache), (value, value_cache)):
        if new.dim() != 3 or cache.dim() != 4 or new.shape[1:] != cache.shape[2:] or len(new) != len(places):
            raise UnsupportedError(
                f"{list(new.shape)} with {len(places)} places does not fit pages {list(cache.shape)}; expected [T, K, D] and "
                "[Z, P, K, D]"
            )
        cache.flatten(0, 1)[places] = new
    return key_cache, value_cache


def _slots(slot_mapping: Tensor, key: Tensor, cache: Tensor) -> Tensor:
    """The places, which are all in range, no two of them the same outside of PADDING."""
    places, (pages, page) = slot_mapping.long(), cache.shape[:2]
    if slot_mapping.dtype not in (torch.int32, torch.int64) or places.dim() != 1:
        raise UnsupportedError(
            f"input slot_mapping is {slot_mapping.dtype} {list(places.shape)}; expected int32 or int64 [{len(key)}]"
        )
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < pages * page:
        raise UnsupportedError(f"slots {_few(places)} are out of range; the cache has {pages} pages of {page}")
    owned = places[places // page != PADDING]
    if len(owned.unique()) < len(owned):
        raise UnsupportedError(f"slots {_few(places)} name a place twice")
    return places


def _few(places: Tensor) -> str:
    shown = ", ".join(map(str, places[:8].tolist()))
    return f"{shown} ..." if len(places) > 8 else shown
