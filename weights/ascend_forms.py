"""The stored parts of quantised linear layers in artifacts for Ascend, where they are others than those of definitions.

Definitions have the parts of model_defs/config/quant.py, and other artifacts store them so. N out features, K in features,
B blocks of a row. Forms that CANN's fast kernels take:

    w8a16   qweight [N, K] uint8 around 128, scales [N, 1]: one for each out feature, a column of the operator's weight

The layers of checkpoints that are quantised already keep their blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..model_defs.config import QUANTS
from .names.rule import Shape
from .tensors import StoredTensor

_ZERO_W8 = 128


def has_column_scales(kind: str, quant: str) -> bool:
    """Whether a layer of quantisation `kind`, in an artifact of `quant`, has one scale for each column."""
    return kind == "w8a16" and quant in QUANTS


def ascend_parts(kind: str, quant: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored parts of a weight of `shape`, by the names after its layer's; `parts` are those of a definition."""
    if not has_column_scales(kind, quant):
        return dict(parts)
    rows, columns = shape
    return {"qweight": StoredTensor("uint8", (rows, columns)), "scales": StoredTensor(parts["scales"].dtype, (rows, 1))}


def as_defined(stored: Tensor, shape: Sequence[int]) -> Tensor:
    """A stored part as a definition has it, of `shape`; () for as it is stored. It is a view, but for rows that do not fill
    their last block."""
    if tuple(shape) in ((), tuple(stored.shape)):
        return stored
    if stored.dtype != torch.uint8:
        return stored.expand(*shape)  # scales
    rows, blocks, block = shape
    missing = blocks * block - stored.shape[1]
    return (pad(stored, (0, missing), value=_ZERO_W8) if missing else stored).view(rows, blocks, block)
