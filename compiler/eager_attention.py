"""Attention of eager programs over heads that are filled up with zeros (weights/head_padding.py): the definitions of
model_defs/ops.py, with the scale of the true width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, width: int, mask: Tensor | None = None) -> Tensor:
    """q [B, T, H*D], k and v [B, S, H*D] -> [B, T, H*D]; of every D elements of a head, `width` are its own."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)
    return out.transpose(1, 2).flatten(2)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int, width: int) -> Tensor:
    """The same of T tokens to themselves; padding (1 in padding [B, T]) does not attend to padding."""
    mask = padding[:, None, :, None] * padding[:, None, None, :] * torch.finfo(q.dtype).min  # [B, 1, T, T]
    return attention(q, k, v, heads, width, mask)


FUNCTIONS = {function.__name__: function for function in (attention, padded_attention)}
