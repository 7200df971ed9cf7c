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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..model_defs.config import QUANTS, quant_bits, quant_block
from .names.rule import Shape
from .quantize import halves, joined_halves
from .tensors import StoredTensor

_ZERO_W8 = 128
_BLOCK, _FEATURES = 128, 64  # of 4 bits: the block, and a divisor of the features, that the fast kernels take
_ROWS = 256  # packed at once: an even number


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


# ---- 4 bits, packed along the out features


def packed_features(part: str, value: Tensor) -> Tensor:
    """The part `part` ("qweight" ...) of a layer in 4 bits, from that of a definition."""
    if part == "scales":
        return value.T.contiguous()
    if part != "qweight":
        return value
    rows, columns = len(value), 2 * value[0].numel()
    packed = torch.empty(columns, rows // 2, dtype=torch.uint8)
    for first in range(0, rows, _ROWS):
        numbers = halves(value[first : first + _ROWS].flatten(1)) ^ 8  # around 8 -> around 0, in two's complement
        packed[:, first // 2 : (first + len(numbers)) // 2] = joined_halves(numbers.T)
    return packed.view(torch.int32)


def unpacked_features(part: str, stored: Tensor, shape: Sequence[int], first: int) -> Tensor:
    """The part of a definition, of `shape`, from the out feature `first` on of a stored layer; a copy of the numbers."""
    if part == "zeros":
        return stored.narrow(0, first, shape[0])
    if part == "scales":
        return stored.narrow(1, first, shape[0]).T
    start, stop = first // 8, -(-(first + shape[0]) // 8)
    numbers = halves(stored[:, start:stop].contiguous().view(torch.uint8))  # [K, N]
    numbers = numbers.narrow(1, first - 8 * start, shape[0]).T ^ 8
    return joined_halves(numbers).view(*shape)
