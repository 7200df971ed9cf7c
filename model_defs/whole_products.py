"""Products of matrices of bytes, exact on every processor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

EXACT_COLUMNS = 1024  # so many products of bytes sum to less than 2^24, and float32 has every integer up to there


def whole_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [K, N], both int8, no number of x being -128: int32 [M, N]."""
    if torch_is_exact():
        return torch.ops.aten._int_mm.default(x, weight)
    total = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.int32)
    for start in range(0, x.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        total += (x[:, columns].float() @ weight[columns].float()).int()
    return total


@functools.cache
def torch_is_exact() -> bool:
    """Whether torch's own product of bytes is exact here, for one row and for several.

    Its kernels for processors without VNNI add pairs of products in 16 bits and saturate.
    """
    weight = torch.full((64, 16), 127, dtype=torch.int8)
    products = (torch.ops.aten._int_mm.default(torch.full((rows, 64), 127, dtype=torch.int8), weight) for rows in (1, 17))
    return all(bool((each == 64 * 127 * 127).all()) for each in products)
