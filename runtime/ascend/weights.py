"""Weights of an artifact as torch tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..artifact import WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


def map_weight(folder: Path, spec: WeightSpec) -> Tensor:
    """One weight of the artifact in `folder`, mapped copy-on-write from its file."""
    import torch

    # numpy has no bfloat16: its bits are mapped.
    stored = "uint16" if spec.dtype == "bfloat16" else spec.dtype
    tensor = torch.from_numpy(np.memmap(folder / spec.file, stored, mode="c", offset=spec.offset, shape=spec.shape))
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


def to_signed(qweight: Tensor) -> Tensor:
    """uint8 weights around 128, as artifacts store them -> int8 around 0, as Ascend graphs take them; same shape and bytes
    but for the top bit of each."""
    import torch

    return (qweight ^ 128).view(torch.int8)
