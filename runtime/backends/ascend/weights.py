"""Weights of an artifact as torch tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...artifact import WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


def map_weight(folder: Path, spec: WeightSpec) -> Tensor:
    """One weight of the artifact in `folder`, mapped copy-on-write from its file."""
    import torch

    # numpy has no bfloat16: its bits are mapped as uint16.
    numpy_dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
    tensor = torch.from_numpy(np.memmap(folder / spec.file, numpy_dtype, mode="c", offset=spec.offset, shape=spec.shape))
    return tensor.view(torch.bfloat16) if spec.dtype == "bfloat16" else tensor


PACKED_BLOCKS = (16, 64)  # bytes of a block of 32 or 128 numbers of 4 bits; blocks of 8 bits have 32 or 128


def to_signed(qweight: Tensor) -> Tensor:
    """Quantised weights of an artifact in the signed form of Ascend graphs: the same but for the top bit of each number.

    Of 8 bits: uint8 around 128 -> int8 around 0, same shape: [N, B, block], or [N, K] with one scale for each column. Of 4
    bits, two in a byte around 8: int32 of eight around 0, the first in the lowest bits, the last axis a quarter as long. int8
    and int32 stay as they are.
    """
    import torch

    if qweight.dtype in (torch.int8, torch.int32):
        return qweight
    if qweight.dim() == 3 and qweight.shape[-1] in PACKED_BLOCKS:
        return (qweight ^ 0x88).view(torch.int32)
    return (qweight ^ 0x80).view(torch.int8)


def to_offsets(zeros: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    """Zero points of an artifact as the offsets that Ascend adds to numbers around 0: [N, B] in the dtype of scales [N, B].

    Of 8 bits: [N, B] uint8. Of 4 bits: [N, ceil(B / 2)], two in a byte, the first in the low bits. The shape of `qweight`
    tells which. Where it is packed along the out features, int32 [K, N / 8], scales and offsets are [B, N].
    """
    import torch

    if qweight.dtype == torch.int32:
        return _small_offsets(zeros, scales.T).T.contiguous()

    if qweight.shape[-1] not in PACKED_BLOCKS:
        return 128 - zeros.to(scales.dtype)
    return _small_offsets(zeros, scales)


def _small_offsets(zeros: Tensor, scales: Tensor) -> Tensor:
    """Zero points of 4 bits as offsets."""
    import torch

    unpacked = torch.stack((zeros & 15, zeros >> 4), dim=-1).flatten(1)[:, : scales.shape[1]]
    return 8 - unpacked.to(scales.dtype)
