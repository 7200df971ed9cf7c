"""Products of eager programs with quantised weights: the weight is dequantised, then multiplied as any other.

For cards whose compiler takes no quantised product. Weights come in the signed form of Ascend graphs (to_signed, to_offsets in
runtime/backends/ascend/weights.py). Activations are never rounded. A weight is as wide as x for as long as its product takes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BITS = 4
MIDDLE = 1 << (BITS - 1)


def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """qweight [N, blocks, block] int8 around 0, or [N, K] in one block; scales, and offsets in `zeros`, [N, blocks]."""
    return _grouped(x, qweight if qweight.dim() == 3 else qweight[:, None], scales, bias, zeros)


def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """qweight [N, blocks, block / 8] int32, eight numbers around 0 in each, the first in the lowest bits."""
    places = torch.arange(0, 32, BITS, dtype=torch.int32, device=qweight.device)
    numbers = (qweight.unsqueeze(-1) >> places) & (2 * MIDDLE - 1)  # [N, blocks, block / 8, 8]
    return _grouped(x, ((numbers ^ MIDDLE) - MIDDLE).flatten(2), scales, bias, zeros)


def linear_packed(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    """qweight [K, N / 8] int32, packed along the out features as in linear_w4 along the block; scales, offsets [blocks, N]."""
    places = torch.arange(0, 32, BITS, dtype=torch.int32, device=qweight.device)
    numbers = (qweight.unsqueeze(-1) >> places) & (2 * MIDDLE - 1)  # [K, N / 8, 8]
    steps = ((numbers ^ MIDDLE) - MIDDLE).flatten(1).t()  # [N, K]
    return _grouped(x, steps.unflatten(1, (scales.shape[0], -1)), scales.t(), bias, None if offsets is None else offsets.t())


def _grouped(x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None, offsets: Tensor | None) -> Tensor:
    steps = numbers.to(x.dtype)
    steps = steps if offsets is None else steps + offsets[..., None].to(x.dtype)
    weight = (steps * scales[..., None].to(x.dtype)).flatten(1)
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(x, weight[:, : x.shape[-1]], bias)  # a last block may be filled up


def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    """qweight [K, N] int8, scales [N] float32."""
    weight = (qweight.float() * scales).to(x.dtype)
    return functional.linear(x, weight.t(), None if bias is None else bias.to(x.dtype))


FUNCTIONS = {function.__name__: function for function in (linear_w8, linear_w4, linear_w8a8)}
