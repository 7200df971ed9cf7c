"""Weights in 8 bits, in the layout of ONNX Runtime's com.microsoft.MatMulNBits.

N rows (output features), K columns (input features), B = ceil(K / block) blocks along a row. A weight is
(q - 128) * scale, with one scale per block; no zero points are stored, 128 is the operator's default. q stays in 1..255,
so that the range is the same on both sides. Columns that pad the last block hold 128, which is zero.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_ZERO, _LARGEST = 128, 127
_CHUNK = 1 << 18  # elements worked on at once; they stay in the cache, and no large temporaries are made


def quantize_w8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] of any float dtype -> q [N, B, block] uint8 and scales [N, B] float32.

    Symmetric, rounded to nearest: an entry is off by at most half its block's scale, which is max|w| / 127. Values have
    to be finite.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    q = torch.empty(rows, blocks, block, dtype=torch.uint8)
    scales = torch.empty(rows, blocks, dtype=torch.float32)
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = pad(weight[first : first + step].float(), (0, blocks * block - columns)).view(-1, blocks, block)
        scale = part.abs().amax(dim=-1) / _LARGEST  # [n, B]
        # A block of zeros has scale 0 and is stored as zeros whatever it is divided by.
        divisor = scale.where(scale > 0, 1.0).unsqueeze(-1)
        q[first : first + step] = (part / divisor).round_().clamp_(-_LARGEST, _LARGEST).add_(_ZERO).to(torch.uint8)
        scales[first : first + step] = scale
    return q, scales


def dequantize_w8(q: Tensor, scales: Tensor, columns: int) -> Tensor:
    """q [N, B, block] uint8, scales [N, B] float32 -> [N, K] float32, K = columns."""
    return ((q.float() - _ZERO) * scales.unsqueeze(-1)).flatten(1)[:, :columns]
