"""The parameters of a definition in an artifact, whose weights may be merged (weights/merging.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..runtime.artifact import WeightSpec
from ..runtime.backends.ascend.weights import map_weight
from ..weights.merged_tensors import member_slice
from ..weights.merging import merged_name


def map_parameter(folder: Path, weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> Tensor:
    """A parameter, or stored part of one, of `shape` in the artifact in `folder`, mapped as `map_weight` does; of a merged one
    it is a view of its rows."""
    if name in weights:
        return map_weight(folder, weights[name])
    return member_slice(map_weight(folder, weights[merged_name(name)]), name, shape)


def stored_bytes(weights: Mapping[str, WeightSpec], name: str, shape: Sequence[int]) -> int | None:
    """The bytes that it takes in the artifact; None if it is not there."""
    spec = weights.get(name) or weights.get(merged_name(name))
    return spec and spec.nbytes // math.prod(spec.shape) * math.prod(shape)
