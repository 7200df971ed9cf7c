"""Rotary position embedding (Su et al. 2021), in float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from .reduce import upcast
from .registry import UnsupportedError, ge_op, same_dtypes

WIDTHS = (64, 128)  # of heads that ApplyRotaryPosEmb takes


@ge_op("RotaryMul")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """x * r1 + rotated(x) * r2, where rotated swaps the halves of the last axis as (-second, first); r1 and r2 broadcast."""
    return _rotate(x, r1, r2)


@ge_op("ApplyRotaryPosEmb")
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, layout: int = 1, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """RotaryMul of query [B, S, N, D] and key [B, S, K, D], cos and sin [B, S, 1, D]: layout 1, D of 64 or 128.

    The operator writes over its operands; torchair feeds it copies, so that new tensors are the same. What is refused here is
    what a 910B is documented to refuse (other chips know more layouts and modes).
    """
    if (layout, rotary_mode) != (1, "half"):
        raise UnsupportedError(
            f"attribute layout = {layout} is not supported; a card takes 1"
            if layout != 1
            else f"attribute rotary_mode = {rotary_mode!r} is not supported; a card takes 'half'"
        )
    same_dtypes(query=query, key=key, cos=cos, sin=sin)
    expected = (*query.shape[:2], 1, query.shape[-1])
    fits = query.dim() == key.dim() == 4 and key.shape[:2] == query.shape[:2] and key.shape[-1] == query.shape[-1]
    if not fits or tuple(cos.shape) != expected or query.shape[-1] not in WIDTHS:
        raise UnsupportedError(
            f"query {list(query.shape)}, key {list(key.shape)}, cos {list(cos.shape)} do not fit; expected [B, S, N, D], "
            f"[B, S, K, D], [B, S, 1, D] with D of {' or '.join(map(str, WIDTHS))}"
        )
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    same_dtypes(x=x, cos=cos, sin=sin)
    if cos.shape != sin.shape or cos.shape[-1] != x.shape[-1] or x.shape[-1] % 2:
        raise UnsupportedError(f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)} do not fit each other")
    y = upcast(x)
    return (y * upcast(cos) + _rotated_halves(y) * upcast(sin)).to(x.dtype)


def _rotated_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
