"""The parameters of a definition in an artifact, whose weights may be merged (weights/merging.py), cut
(weights/head_pieces.py) or of another form (weights/ascend_forms.py)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.artifact import WeightSpec
from ..runtime.backends.ascend.weights import map_weight
from ..weights.ascend_contents import as_defined, unpacked_features
from ..weights.head_pieces import HEAD, piece_name
from ..weights.merged_tensors import first_row, member_slice, rows_axis
from ..weights.merging import merged_name


def map_parameter(folder: Path, weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> Tensor:
    """A parameter, or stored part of one, of `shape` in the artifact in `folder`, mapped as `map_weight` does; of a merged one
    it is a view of its rows, and of one in pieces, or packed along its out features, a copy."""
    if shape and (features := _packed_features(weights, name)):
        whole = map_weight(folder, weights[name if name in weights else merged_name(name)])
        first = 0 if name in weights else first_row(name, features, shape[0])
        return unpacked_features(name.rpartition(".")[2], whole, shape, first)
    if name in weights:
        return as_defined(map_weight(folder, weights[name]), shape)
    if pieces := _pieces(weights, name):
        return as_defined(torch.cat([map_weight(folder, piece) for piece in pieces]), shape)
    return as_defined(member_slice(map_weight(folder, weights[merged_name(name)]), name, shape), shape)


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
    if spec := weights.get(merged_name(name)):
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
