"""The most likely next tokens, selected on the card."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import aten

# Of a row of logits, when its largest are looked for: so few that the second search is short, and a whole number of vectors.
TOP_BLOCK = 64


def top_tokens(logits: Tensor, inverse_temperature: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """In two steps, so that no long row is sorted: the blocks with the largest maxima, then the largest of what is in them.

    Everything in float32: the sum needs it, and all of these operators take it.
    """
    logits = logits.float()
    short = logits.shape[-1] <= 2 * count * TOP_BLOCK
    values, ids = aten.topk.default(logits, count) if short else _of_blocks(logits, count)
    below = (logits - values[:, :1]) * inverse_temperature[:, None]
    return values, ids.int(), below.exp().sum(-1)


def _of_blocks(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row lie in the `count` blocks with the largest maxima, whichever of equals are taken."""
    rows, vocab = logits.shape
    blocks, missing = math.ceil(vocab / TOP_BLOCK), -vocab % TOP_BLOCK
    if missing:
        logits = aten.constant_pad_nd.default(logits, [0, missing], -math.inf)
    parts = logits.reshape(rows * blocks, TOP_BLOCK)
    maxima = aten.max.dim(parts, -1)[0].reshape(rows, blocks)  # amax has no converter
    _, best = aten.topk.default(maxima, count)  # [R, count]
    best = best.int()
    first = torch.arange(rows, dtype=torch.int32, device=logits.device)[:, None] * blocks
    entries = parts.index_select(0, (best + first).flatten()).reshape(rows, count * TOP_BLOCK)
    within = torch.arange(TOP_BLOCK, dtype=torch.int32, device=logits.device)
    ids = (best[..., None] * TOP_BLOCK + within).reshape(rows, count * TOP_BLOCK)
    values, place = aten.topk.default(entries, count)
    return values, ids.gather(1, place)
