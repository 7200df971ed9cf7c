"""The stored parts of quantised linear layers in artifacts for Ascend, where they are others than those of definitions.

Definitions have the parts of model_defs/config/quant.py, and other artifacts store them so. N out features, K in features,
B blocks of a row. Forms that CANN's fast kernels take:

    w8a16   qweight [N, K] uint8 around 128, scales [N, 1]: one for each out feature, a column of the operator's weight
    w4a16   qweight [K, N / 8] int32, eight numbers of 4 bits around 0 in each, the first in the lowest bits; scales [B, N].
            Only of blocks of 128 that fill their rows, and N a multiple of 64

The layers of checkpoints that are quantised already keep their blocks in 8 bits; those in 4 bits have the form too, with zero
points as they are in a definition.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..model_defs.config import QUANTS, quant_bits, quant_block
from .names.rule import Shape
from .tensors import StoredTensor

_BLOCK, _FEATURES = 128, 64  # of 4 bits: the block, and a divisor of the features, that the fast kernels take


def has_column_scales(kind: str, quant: str) -> bool:
    """Whether a layer of quantisation `kind`, in an artifact of `quant`, has one scale for each column."""
    return kind == "w8a16" and quant in QUANTS


def packs_features(kind: str, shape: Shape) -> bool:
    """Whether a layer of `shape` [N, K] and quantisation `kind` is packed along its out features."""
    rows, columns = shape
    whole = columns % _BLOCK == 0 and rows % _FEATURES == 0
    return whole and quant_bits(kind) == 4 and quant_block(columns, kind) == _BLOCK


def ascend_parts(kind: str, quant: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The stored parts of a weight of `shape`, by the names after its layer's; `parts` are those of a definition."""
    rows, columns = shape
    if packs_features(kind, shape):
        own = {"qweight": StoredTensor("int32", (columns, rows // 8))}
        own["scales"] = StoredTensor(parts["scales"].dtype, parts["scales"].shape[::-1])
        return {**parts, **own}
    if not has_column_scales(kind, quant):
        return dict(parts)
    return {"qweight": StoredTensor("uint8", (rows, columns)), "scales": StoredTensor(parts["scales"].dtype, (rows, 1))}
