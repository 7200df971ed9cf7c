"""The parameters of a definition in an artifact, whose weights may be merged (weights/merging.py), cut
(weights/head_pieces.py), of filled up heads (weights/head_padding.py) or of another form (weights/ascend_forms.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.artifact import WeightSpec
from ..runtime.backends.ascend.weights import map_weight
from ..weights.ascend_contents import as_defined, unpacked_features, without_padding
from ..weights.head_padding import head_axis, padded_shape
from ..weights.head_pieces import HEAD, piece_name
from ..weights.merged_tensors import first_row, member_slice, rows_axis
from ..weights.merging import members_of, merged_name


def map_parameter(
    folder: Path, weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int], head_width: int = 0
) -> Tensor:
    """A parameter, or stored part of one, of `shape` in the artifact in `folder`, mapped as `map_weight` does; of a merged one
    it is a view of its rows, and of one in pieces, packed along its out features, or of filled up heads, a copy.

    `head_width`: the true width of the heads that it has rows or columns of; 0: it has none that may be filled up.
    """
    padded = padded_shape(name, tuple(shape), head_width)
    if padded != tuple(shape) and _heads_size(weights, name) == padded[head_axis(name) or 0]:
        return without_padding(name, map_parameter(folder, weights, name, padded), head_width)
    if shape and (features := _packed_features(weights, name)):
        whole = map_weight(folder, weights[name if name in weights else merged_name(name)])
        first = 0 if name in weights else first_row(name, features, shape[0])
        return unpacked_features(name.rpartition(".")[2], whole, shape, first)
    if name in weights:
        return as_defined(map_weight(folder, weights[name]), shape)
    if pieces := _pieces(weights, name):
        return as_defined(torch.cat([map_weight(folder, piece) for piece in pieces]), shape)
    return as_defined(member_slice(map_weight(folder, weights[merged_name(name)]), name, shape), shape)


def _heads_size(weights: Mapping[str, WeightSpec], name: str) -> int:
    """How much of the axis of its heads is stored of a parameter of a tower, all members of whose merged ones are alike."""
    axis = head_axis(name)
    assert axis is not None, name
    if spec := weights.get(name):
        return spec.shape[axis]
    whole = merged_name(name)
    return weights[whole].shape[axis] // len(members_of(whole))


def _packed_features(weights: Mapping[str, WeightSpec], name: str) -> int:
    """The out features of the stored layer, perhaps merged, that `name` is a part of, where they are packed; else 0."""
    stem, _, part = name.rpartition(".")
    numbers = weights.get(f"{stem}.qweight") or weights.get(merged_name(f"{stem}.qweight"))
    if numbers is None or numbers.dtype != "int32" or part not in ("qweight", "scales", "zeros"):
        return 0
    return 8 * numbers.shape[1]


def stored_bytes(weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> int | None:
    """The bytes that it takes in the artifact; None if it is not there."""
    if pieces := _pieces(weights, name):
        return sum(piece.nbytes for piece in pieces)
    if spec := weights.get(name):
        return spec.nbytes
    if spec := weights.get(whole := merged_name(name)):
        if head_axis(name) is not None:  # of a tower, all members alike
            return spec.nbytes // len(members_of(whole))
        if features := _packed_features(weights, name):
            return spec.nbytes * shape[0] // features
        axis = rows_axis(name, getattr(torch, spec.dtype))
        return spec.nbytes // spec.shape[axis] * shape[axis]
    return None


def _pieces(weights: Mapping[str, WeightSpec], name: str) -> list[WeightSpec]:
    """The pieces of a part of lm_head; none where it is whole, or another layer's."""
    if name in weights or not name.startswith(f"{HEAD}."):
        return []
    names = itertools.takewhile(weights.__contains__, (piece_name(name, place) for place in itertools.count()))
    return [weights[each] for each in names]
