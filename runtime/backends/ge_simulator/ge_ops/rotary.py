"""Rotary position embedding (Su et al. 2021), in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reduce import upcast
from .registry import UnsupportedError, ge_op, same_dtypes


@ge_op("RotaryMul")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """x * r1 + rotated(x) * r2, where rotated swaps the halves of the last axis as (-second, first); r1 and r2 broadcast."""
    return _rotate(x, r1, r2, _rotated_halves)


@ge_op("ApplyRotaryPosEmb")
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, layout: int = 1, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """RotaryMul of query and key, in four axes (layout 1 BSND, 2 SBND, 3 BNSD) or three (4 TND), cos and sin with one head.

    The operator writes over its operands; torchair feeds it copies, so that new tensors are the same.
    """
    modes = {"half": _rotated_halves, "interleave": _rotated_pairs}
    if rotary_mode not in modes:
        raise UnsupportedError(f"attribute rotary_mode = {rotary_mode!r} is not supported; expected one of {', '.join(modes)}")
    rank = 3 if layout == 4 else 4
    if layout not in (1, 2, 3, 4) or query.dim() != rank or cos.dim() != rank:
        raise UnsupportedError(f"attribute layout = {layout} with query {list(query.shape)}, cos {list(cos.shape)}")
    same_dtypes(query=query, key=key, cos=cos, sin=sin)
    return _rotate(query, cos, sin, modes[rotary_mode]), _rotate(key, cos, sin, modes[rotary_mode])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rotated: Callable[[Tensor], Tensor]) -> Tensor:
    same_dtypes(x=x, cos=cos, sin=sin)
    if cos.shape != sin.shape or cos.shape[-1] != x.shape[-1] or x.shape[-1] % 2:
        raise UnsupportedError(f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)} do not fit each other")
    y = upcast(x)
    return (y * upcast(cos) + rotated(y) * upcast(sin)).to(x.dtype)


def _rotated_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _rotated_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
