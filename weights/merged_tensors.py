"""The contents of merged linear layers (merging.py): members written into one tensor, and read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .merging import members_of, merged_name
from .tensors import StoredTensor


def rows_axis(name: str, dtype: torch.dtype) -> int:
    """The axis of out features of a stored part: the last one of whole-number products, which are stored transposed."""
    return 1 if name.endswith(".qweight") and dtype == torch.int8 else 0


def concatenated(
    parts: Mapping[str, StoredTensor], members: Iterable[str], make: Callable[[str], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The stored `parts` of a merged parameter, in their stored dtypes, from those that `make` gives of its `members`.

    Members are made one at a time, each written into its place.
    """
    whole = {name: torch.empty(part.shape, dtype=getattr(torch, part.dtype)) for name, part in parts.items()}
    filled = dict.fromkeys(whole, 0)
    for member in members:
        _fill(whole, filled, make(member))
    assert all(filled[name] == each.shape[rows_axis(name, each.dtype)] for name, each in whole.items()), filled
    return whole


def _fill(whole: Mapping[str, Tensor], filled: dict[str, int], member: Mapping[str, Tensor]) -> None:
    """Write a member's parts after those that are there; `filled` counts rows."""
    assert len(member) == len(whole), (member.keys(), whole.keys())
    for part, value in member.items():
        name = merged_name(part)
        axis, first = rows_axis(name, whole[name].dtype), filled[name]
        whole[name].narrow(axis, first, value.shape[axis]).copy_(value)
        filled[name] += value.shape[axis]


def member_slice(whole: Tensor, name: str, shape: Sequence[int]) -> Tensor:
    """The stored part `name`, of `shape`, as a view of the merged tensor that it is a member of."""
    axis = rows_axis(name, whole.dtype)
    return whole.narrow(axis, first_row(name, whole.shape[axis], shape[axis]), shape[axis])


def first_row(name: str, total: int, rows: int) -> int:
    """Where the `rows` of member `name` begin among the `total` of the merged part."""
    members = members_of(merged_name(name))
    place = members.index(name)
    return total - (len(members) - place) * rows if place else 0
