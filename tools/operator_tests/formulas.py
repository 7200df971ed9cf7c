"""Plain torch formulas of what operators compute, in the precision of their arguments: the references of operator tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square over the last axis, times weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def standard(x: Tensor, axes: int, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over the last axes."""
    dims = tuple(range(-axes, 0))
    centred = x - x.mean(dims, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + eps)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last axis, half-rotation form."""
    half = x.shape[-1] // 2
    return torch.cat(
        (
            x[..., :half] * cos[..., :half] - x[..., half:] * sin[..., :half],
            x[..., half:] * cos[..., half:] + x[..., :half] * sin[..., half:],
        ),
        -1,
    )


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """The exact form."""
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def rounded_rows(x: Tensor) -> Tensor:
    """Each row in whole steps of a 127th of its largest magnitude."""
    scales = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scales.where(scales > 0, 1.0)) * scales


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys that are `visible` [B, Q, S] (None: all), one head at a time.

    q [B, H, Q, D], k and v [B, K, S, D], query head h with kv head h // (H / K): [B, H, Q, D]. A query that sees no key attends
    evenly to all.
    """
    out = torch.empty_like(q)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        head = h // (q.shape[1] // k.shape[1])
        scores = q[b, h] @ k[b, head].T / q.shape[-1] ** 0.5
        if visible is not None:
            scores = scores.masked_fill(~visible[b], -torch.inf)
            scores = scores.masked_fill(~visible[b].any(-1, keepdim=True), 0)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        out[b, h] = weights @ v[b, head] / weights.sum(-1, keepdim=True)
    return out
