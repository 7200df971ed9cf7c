"""The contents of quantised layers in the forms that only artifacts for Ascend have (ascend_forms.py), and back again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .head_padding import head_axis, padded_width
from .quantize import halves, joined_halves

_ZERO_W8 = 128
_ROWS = 256  # packed at once: an even number


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


# ---- heads that are filled up


def padded_heads(name: str, value: Tensor, width: int) -> Tensor:
    """A parameter, or stored part, with its heads of `width` elements filled up with zeros; 0: it has none."""
    axis = head_axis(name)
    missing = padded_width(width) - width
    if axis is None or not missing:
        return value
    heads = value.unflatten(axis, (-1, width))
    return pad(heads, (0, 0) * (heads.dim() - axis - 2) + (0, missing)).flatten(axis, axis + 1)


def without_padding(name: str, stored: Tensor, width: int) -> Tensor:
    """What `padded_heads` was given; a copy."""
    axis = head_axis(name)
    assert axis is not None, name
    heads = stored.unflatten(axis, (-1, padded_width(width)))
    return heads.narrow(axis + 1, 0, width).flatten(axis, axis + 1)


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
