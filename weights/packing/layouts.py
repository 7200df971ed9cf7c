"""Packed tensors -> integers, scales and zero points, for every supported format.

N rows (output features), K columns (input features), G groups of columns that share a scale.

    compressed-tensors   weight_packed int32 [N, K * bits / 32], the first number in the lowest bits; weight_scale [N, G];
                         weight_zero_point int32 [N * bits / 32, G], packed along N; weight_g_idx [K]. Or weight int8 [N, K],
                         weight_zero_point int8 [N, G]
    GPTQ                 qweight int32 [K * bits / 32, N], the first in the lowest bits; qzeros int32 [G, N * bits / 32];
                         scales [G, N]; g_idx [K]
    AWQ                  qweight int32 [K, N / 8] of 8 neighbouring features in the order 0 2 4 6 1 3 5 7, the first in the
                         lowest bits; qzeros int32 [G, N / 8] likewise; scales [G, N]

Numbers are unsigned around 2^(bits - 1) in all of them but int8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantize import halves
from ..tensors import WeightsError
from .settings import Packing

_ROWS = 256  # dequantised at once, so that temporaries stay small
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Read = Callable[[str], Tensor]  # part of a module -> its tensor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One weight: (q - zero) * scale, both of the group that `groups` names for the column."""

    q: Tensor  # [N, K] uint8
    scales: Tensor  # [N, G], as in the checkpoint
    zeros: Tensor | None  # [N, G] uint8; None: 2^(bits - 1)
    groups: Tensor  # [K] int64

    def rows(self, first: int, stop: int) -> PackedWeight:
        zeros = None if self.zeros is None else self.zeros[first:stop]
        return PackedWeight(self.q[first:stop], self.scales[first:stop], zeros, self.groups)

    def columns(self, first: int, stop: int) -> PackedWeight:
        return PackedWeight(self.q[:, first:stop], self.scales, self.zeros, self.groups[first:stop])

    def dequantised(self, bits: int) -> Tensor:
        """[N, K] float32."""
        weight = torch.empty(self.q.shape, dtype=torch.float32)
        for first in range(0, len(weight), _ROWS):
            rows = slice(first, first + _ROWS)
            middle = 1 << bits - 1 if self.zeros is None else self.zeros[rows][:, self.groups]
            weight[rows].copy_(self.q[rows]).sub_(middle).mul_(self.scales[rows].float()[:, self.groups])
        return weight


def unpack(packing: Packing, parts: Collection[str], read: Read, columns: int) -> PackedWeight:
    """The weight of one module, of which `read` gives each of its `parts`; K = columns.

    Raises WeightsError for zero points where the settings say that there are none.
    """
    if packing.method == "compressed-tensors":
        q = _unsigned(read("weight")) if "weight" in parts else _numbers(read("weight_packed"), packing.bits)[:, :columns]
        zeros = _compressed_zeros(read("weight_zero_point"), packing, len(q)) if "weight_zero_point" in parts else None
        index = read("weight_g_idx") if "weight_g_idx" in parts else None
        return PackedWeight(q, read("weight_scale"), _required(zeros, packing), _groups(index, packing, columns))
    if packing.method == "gptq":
        q = _numbers(read("qweight").T.contiguous(), packing.bits)
        zeros = _numbers(read("qzeros"), packing.bits).T
        index = read("g_idx") if "g_idx" in parts else None
    else:
        q, zeros, index = _awq_numbers(read("qweight")).T, _awq_numbers(read("qzeros")).T, None
    # A stored zero point is less by one, so that 0 is stored as the largest number.
    zeros = (zeros + packing.zero_shift) & (1 << packing.bits) - 1
    return PackedWeight(q.contiguous(), read("scales").T, _required(zeros, packing), _groups(index, packing, columns))


def _compressed_zeros(stored: Tensor, packing: Packing, rows: int) -> Tensor:
    """[N, G] int8 around 0, or packed along N -> [N, G] uint8 around the middle."""
    if stored.dtype == torch.int8:
        return (stored + (1 << packing.bits - 1)).view(torch.uint8) if packing.bits == 4 else _unsigned(stored)
    return _numbers(stored.T.contiguous(), packing.bits)[:, :rows].T


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """[R, n] int32 -> [R, n * 32 / bits] uint8, the first in the lowest bits."""
    whole = packed.view(torch.uint8)
    return halves(whole) if bits == 4 else whole


def _awq_numbers(packed: Tensor) -> Tensor:
    """[R, n] int32 -> [R, 8 * n] uint8."""
    stored = _numbers(packed, 4).unflatten(1, (-1, len(AWQ_ORDER)))
    numbers = torch.empty_like(stored)
    numbers[..., list(AWQ_ORDER)] = stored
    return numbers.flatten(1)


def _unsigned(whole: Tensor) -> Tensor:
    """int8 around 0 -> uint8 around 128."""
    return whole.view(torch.uint8) ^ 0x80


def _required(zeros: Tensor | None, packing: Packing) -> Tensor | None:
    """Zero points, or None where they are all in the middle because the settings say so."""
    if not packing.symmetric:
        if zeros is None:
            raise WeightsError("has no zero points, but the checkpoint's settings say that it is not symmetric")
        return zeros
    if zeros is not None and not bool((zeros == 1 << packing.bits - 1).all()):
        raise WeightsError("has zero points, but the checkpoint's settings say that it is symmetric")
    return None


def _groups(index: Tensor | None, packing: Packing, columns: int) -> Tensor:
    """The group of every column."""
    if index is not None and bool((index >= 0).all()):  # compressed-tensors writes -1 where there is no order
        return index.long()
    return torch.arange(columns) // (packing.group or columns)
