"""Quantisation of weights to 8 and 4 bits, in the layouts of model_defs/config/quant.py.

N rows (output features), K columns (input features), B = ceil(K / block) blocks along a row. Weights with scales for
blocks have the layout of ONNX Runtime's com.microsoft.MatMulNBits, without zero points: 128 and 8 are the defaults of the
operator. Columns that pad the last block are zero. All quantisation is symmetric and rounds to the nearest.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..model_defs.config import quant_bits, quant_block

_ZERO, _LARGEST = 128, 127
_ZERO_W4, _LEAST_W4 = 8, -8
# Steps of 4 bits that are tried for each block, relative to the step at which its largest entry is -8 (or 8, with the other
# sign). The one with the least squared error is taken: 14 % less than with max|w| / 7 for normal weights; zero points: 17 %.
_STEPS_W4 = (1.0, 0.93, 0.86, -1.0)
_CHUNK = 1 << 18  # elements quantised at once; they stay in the processor's cache, and temporaries stay small


def quantize(quant: str, weight: Tensor) -> dict[str, Tensor]:
    """weight [N, K] of any float dtype -> its stored parts (quant_parts), scales in float32. Values have to be finite."""
    if quant == "w8a8":
        q, scales = quantize_w8a8(weight)
    else:
        function = quantize_w8 if quant == "w8a16" else quantize_w4
        q, scales = function(weight, quant_block(weight.shape[1], quant))
    return {"qweight": q, "scales": scales}


def dequantize(quant: str, parts: Mapping[str, Tensor], columns: int) -> Tensor:
    """Stored parts -> the weight [N, K] that they stand for, in float32; K = columns."""
    q, scales = parts["qweight"], parts["scales"].float()
    if quant == "w8a8":
        return (q.float() * scales).T
    zeros = parts.get("zeros")
    if quant_bits(quant) == 8:
        return dequantize_w8(q, scales, columns, zeros)
    return dequantize_w4(q, scales, columns, None if zeros is None else halves(zeros)[:, : scales.shape[1]])


def quantize_w8(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [N, B, block] uint8 in 1..255 and scales [N, B] float32; a weight is (q - 128) * scale.

    An entry is off by at most half its block's scale, which is max|w| / 127.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    q = torch.empty(rows, blocks, block, dtype=torch.uint8)
    scales = torch.empty(rows, blocks, dtype=torch.float32)
    for span, part in _parts(weight, block):
        scale = part.abs().amax(dim=-1) / _LARGEST  # [n, B]
        divisor = _divisor(scale).unsqueeze(-1)
        q[span] = (part / divisor).round_().clamp_(-_LARGEST, _LARGEST).add_(_ZERO).to(torch.uint8)
        scales[span] = scale
    return q, scales


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [N, K] uint8 in 1..255 and scales [N, 1] float32: as `quantize_w8` with one block a row."""
    q, scales = quantize_w8(weight, weight.shape[1])
    return q.flatten(1), scales


def dequantize_w8(q: Tensor, scales: Tensor, columns: int, zeros: Tensor | None = None) -> Tensor:
    """q [N, B, block] uint8, scales [N, B] float32, zeros [N, B] uint8 (None: 128) -> [N, K] float32, K = columns."""
    middle = _ZERO if zeros is None else zeros.float().unsqueeze(-1)
    return ((q.float() - middle) * scales.unsqueeze(-1)).flatten(1)[:, :columns]


def quantize_w4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [N, B, block / 2] uint8, two of 0..15 in each, and scales [N, B] float32; a weight is (q - 8) * scale.

    A block's entry of the largest magnitude lies at -8 or 8 steps or beyond; a scale may be negative.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block)
    q = torch.empty(rows, blocks, block // 2, dtype=torch.uint8)
    scales = torch.empty(rows, blocks, dtype=torch.float32)
    for span, part in _parts(weight, block):
        scale = best_scale_w4(part)
        q[span] = packed_w4(whole_w4(part, scale.unsqueeze(-1)))
        scales[span] = scale
    return q, scales


def best_scale_w4(blocks: Tensor) -> Tensor:
    """blocks [..., block] -> [...]: for each block, of the scales of _STEPS_W4, the one with the least squared error."""
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = torch.stack([largest * (part / _LEAST_W4) for part in _STEPS_W4])
    errors = torch.stack(
        [(whole_w4(blocks, each.unsqueeze(-1)) * each.unsqueeze(-1) - blocks).square_().sum(-1) for each in scales]
    )
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def whole_w4(weights: Tensor, scale: Tensor) -> Tensor:
    """Weights as integers of steps from -8 to 7, in a float dtype; `scale` broadcasts against them."""
    return (weights / _divisor(scale)).round_().clamp_(_LEAST_W4, -_LEAST_W4 - 1)


def packed_w4(whole: Tensor) -> Tensor:
    """Whole numbers [..., block] from -8 to 7 -> uint8 [..., block / 2], two in each, the first in the low bits."""
    return joined_halves((whole + _ZERO_W4).to(torch.uint8))


def dequantize_w4(q: Tensor, scales: Tensor, columns: int, zeros: Tensor | None = None) -> Tensor:
    """q [N, B, block / 2] uint8, scales [N, B] float32, zeros [N, B] uint8 (None: 8) -> [N, K] float32, K = columns."""
    middle = _ZERO_W4 if zeros is None else zeros.float().unsqueeze(-1)
    return ((halves(q).float() - middle) * scales.unsqueeze(-1)).flatten(1)[:, :columns]


def halves(packed: Tensor) -> Tensor:
    """[..., n] uint8 -> [..., 2 * n]: both numbers of 4 bits of each, the low bits first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def joined_halves(whole: Tensor) -> Tensor:
    """[..., n] uint8 below 16 -> [..., ceil(n / 2)]: two in each, the first in the low bits; zero fills up an odd n."""
    whole = pad(whole, (0, whole.shape[-1] % 2))
    return whole[..., 0::2] | whole[..., 1::2] << 4


def quantize_w8a8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> q [K, N] int8 in -127..127 and scales [N] float32, max|w| / 127 of each row."""
    rows, columns = weight.shape
    q = torch.empty(columns, rows, dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    for span, part in _parts(weight, columns):
        scale = part.abs().amax(dim=-1) / _LARGEST  # [n, 1]
        whole = (part / _divisor(scale).unsqueeze(-1)).round_().clamp_(-_LARGEST, _LARGEST)
        q[:, span] = whole.squeeze(1).T.to(torch.int8)
        scales[span] = scale.squeeze(1)
    return q, scales


def _parts(weight: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, in float32 and in blocks: [n, B, block]."""
    rows, columns = weight.shape
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = weight[first : first + step].float()
        yield slice(first, first + len(part)), pad(part, (0, -columns % block)).view(len(part), -1, block)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, with 1 for 0: a block of zeros is stored as zeros, whatever the divisor."""
    return scale.where(scale != 0, 1.0)
