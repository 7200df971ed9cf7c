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
from ..weights.ascend_forms import as_defined
from ..weights.head_pieces import HEAD, piece_name
from ..weights.merged_tensors import member_slice, rows_axis
from ..weights.merging import merged_name


def map_parameter(folder: Path, weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> Tensor:
    """A parameter, or stored part of one, of `shape` in the artifact in `folder`, mapped as `map_weight` does; of a merged one
    it is a view of its rows, and of one in pieces a copy."""
    if name in weights:
        return as_defined(map_weight(folder, weights[name]), shape)
    if pieces := _pieces(weights, name):
        return as_defined(torch.cat([map_weight(folder, piece) for piece in pieces]), shape)
    return as_defined(member_slice(map_weight(folder, weights[merged_name(name)]), name, shape), shape)


def stored_bytes(weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> int | None:
    """The bytes that it takes in the artifact; None if it is not there."""
    if pieces := _pieces(weights, name):
        return sum(piece.nbytes for piece in pieces)
    if spec := weights.get(name):
        return spec.nbytes
    if spec := weights.get(merged_name(name)):
        axis = rows_axis(name, getattr(torch, spec.dtype))
        return spec.nbytes // spec.shape[axis] * shape[axis]
    return None


def _pieces(weights: Mapping[str, WeightSpec], name: str) -> list[WeightSpec]:
    """The pieces of a part of lm_head; none where it is whole, or another layer's."""
    if name in weights or not name.startswith(f"{HEAD}."):
        return []
    return list(itertools.takewhile(bool, (weights.get(piece_name(name, place)) for place in itertools.count())))
