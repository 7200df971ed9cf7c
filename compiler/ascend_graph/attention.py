"""Rotary embedding, and attention over caches, within a tower and across to images.

B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, X keys of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...weights.head_padding import MULTIPLE
from .operators import air, npu

# The fused attention takes heads whose width is a multiple of this, in 16-bit types (CANN, FusedInferAttentionScore).
HEAD_ALIGNMENT = MULTIPLE
INT8_HEAD_ALIGNMENT = 32  # where keys or values are int8
INT8 = 1  # torch's own number of the dtype
MOST_INT8_QUERIES = 16  # of a row, with keys and values of int8 and scales of channels; more than one only in bfloat16
# The side of the triangle that stands for a causal mask of any size (CANN, FusedInferAttentionScore, sparse_mode 2 to 4).
CAUSAL_SIDE = 2048
RIGHT_DOWN_CAUSAL = 3  # sparse_mode: the last query sees the last key, at the true lengths
ROWS = -2  # the axis of a cache [B, K, S, D] into which new rows are written, as Scatter's documents name it
# What is added to a score is 0 or far below this; see CROSS_HIDDEN in runtime/artifact.py.
HIDDEN_BELOW = -1e4


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RotaryMul, in its layout BSND."""
    b, t, d = cos.shape
    cos, sin = (each.to(x.dtype)[:, :, None] for each in (cos, sin))  # [B, T, 1, D]
    return npu.npu_rotary_mul.default(x.view(b, t, -1, d), cos, sin).view(x.shape)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scatter the new rows after the old ones, then fused attention over the whole caches up to their true lengths.

    Lengths go in as a tensor. A chunk counts as whole, its padding included: its last token sees the last row written,
    which is what the operator calls right-down causal at the lengths T and lengths + T.
    """
    k_cache = _append(k_cache, k, lengths)
    v_cache = _append(v_cache, v, lengths)
    return _over_caches(q, k_cache, v_cache, lengths, heads), k_cache, v_cache


def int8_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over caches of int8, scales being [K, 1, D].

    The operator takes scales of channels for one token of each row in both 16-bit types, and for up to MOST_INT8_QUERIES in
    bfloat16 (constraints of torch_npu.npu_fused_infer_attention_score: query bfloat16, scales [K, D], [K, 1, D] or [K * D]).
    Elsewhere what this layer reads of its caches is dequantised first, a copy that lives as long as the layer.
    """
    steps = (k_scale.float().flatten(), v_scale.float().flatten())
    return over_int8_caches(q, (k, v), (k_cache, v_cache), (k_scale, v_scale), steps, lengths, heads)


Pair = tuple[Tensor, Tensor]  # one of keys and one of values


def over_int8_caches(
    q: Tensor, new: Pair, caches: Pair, scales: Pair, steps: Pair, lengths: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the scales twice: `steps` [K*D] in float32, in which Quantize divides by them."""
    k_cache, v_cache = (_append(cache, rounded(x, step), lengths) for cache, x, step in zip(caches, new, steps, strict=True))
    k_scale, v_scale = scales
    if q.shape[1] == 1:
        taken = {"key_antiquant_scale": k_scale[None], "value_antiquant_scale": v_scale[None]}  # [1, K, 1, D]
        return _over_caches(q, k_cache, v_cache, lengths, heads, **taken), k_cache, v_cache
    if q.dtype == torch.bfloat16 and q.shape[1] <= MOST_INT8_QUERIES:
        taken = {"key_antiquant_scale": k_scale, "value_antiquant_scale": v_scale}
        return _over_caches(q, k_cache, v_cache, lengths, heads, **taken), k_cache, v_cache
    keys, values = k_cache.to(q.dtype) * k_scale, v_cache.to(q.dtype) * v_scale
    return _over_caches(q, keys, values, lengths, heads), k_cache, v_cache


def rounded(x: Tensor, steps: Tensor) -> Tensor:
    """Quantize: x [B, T, K*D] in whole steps of its channels, int8."""
    return npu.npu_quantize.default(x, steps, None, INT8, axis=-1, div_mode=True)


def _over_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, heads: int, **scales: Tensor) -> Tensor:
    """Fused attention of q [B, T, H*D] to all rows up to its own, those at `lengths` and on."""
    t = q.shape[1]
    kv_heads, _, d = k_cache.shape[1:]
    mask: dict[str, Any] = {}
    if t > 1:
        mask = {"atten_mask": causal_triangle(q.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    out = fused_attention(
        heads_first(q, heads),
        k_cache,
        v_cache,
        heads,
        d,
        input_layout=_layout(t),
        actual_seq_lengths_kv=(lengths + t).long(),
        num_key_value_heads=kv_heads,
        **mask,
        **scales,
    )
    return heads_joined(out, t)


def _append(cache: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """new [B, T, K*D] as rows `lengths` and on of cache [B, K, S, D]."""
    return npu.scatter_update.default(cache, lengths, heads_first(new, cache.shape[1]), ROWS)


def causal_triangle(device: torch.device) -> Tensor:
    """True above the diagonal. Made by comparing in the graph: as a constant it would be 4 MB of every graph file."""
    place = torch.arange(CAUSAL_SIDE, dtype=torch.int32, device=device)
    return place[:, None] < place[None]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Fused attention on rows as they are (BSH)."""
    return whole_attention(q, k, v, heads, q.shape[-1] // heads)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int) -> Tensor:
    """The same with a mask: padding does not see padding."""
    return whole_padded_attention(q, k, v, padding, heads, q.shape[-1] // heads)


def whole_padded_attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, heads: int, width: int) -> Tensor:
    """The same over heads that are filled up, of the true `width`."""
    padded = padding > 0  # [B, T]
    return whole_attention(q, k, v, heads, width, atten_mask=(padded[:, :, None] & padded[:, None])[:, None])


def whole_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, width: int, **mask: Tensor) -> Tensor:
    """`attention` over heads of the true `width`, which may be filled up with zeros: they add nothing to a score."""
    assert q.shape[-1] % (heads * HEAD_ALIGNMENT) == 0, f"{heads} heads in {q.shape}"
    return fused_attention(q, k, v, heads, width, input_layout="BSH", num_key_value_heads=heads, **mask)


def cross_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """Fused attention to the keys of all images, joined, with a mask of what a token does not see.

    A token that sees nothing attends evenly to everything, as by the definition: it has a query of zeros and no mask.
    """
    kv_heads, x, d = keys[0].shape[1:]
    hidden = mask < HIDDEN_BELOW  # [B, T, n * t]
    sees = (~hidden).to(q.dtype).sum(-1, keepdim=True) > 0  # [B, T, 1]
    q = q * sees.to(q.dtype)
    out = fused_attention(
        heads_first(q, heads),
        keys[0] if len(keys) == 1 else torch.cat(list(keys), dim=2),
        values[0] if len(values) == 1 else torch.cat(list(values), dim=2),
        heads,
        d,
        input_layout=_layout(q.shape[1]),
        num_key_value_heads=kv_heads,
        atten_mask=_by_key(hidden & sees, x * len(keys)),
    )
    return heads_joined(out, q.shape[1])


def _by_key(hidden: Tensor, keys: int) -> Tensor:
    """[B, T, tiles] -> [B, 1, T, keys]: the value of a tile for each of its keys."""
    b, t, tiles = hidden.shape
    return hidden[..., None].expand(b, t, tiles, keys // tiles).reshape(b, 1, t, keys)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, d: int, **arguments: Any) -> Tensor:
    """torchair's form of the operator, whose lengths are tensors; the scale is that of the true head width `d`."""
    return air.npu_fused_infer_attention_score.default(q, k, v, num_heads=heads, scale=d**-0.5, **arguments)[0]


def _layout(tokens: int) -> str:
    """Of queries and keys, and of the result where it is another: the operator takes a second one for several queries only."""
    return "BNSD" if tokens == 1 else "BNSD_BSND"


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] -> [B, H, T, D]; of one token a view."""
    b, t, _ = x.shape
    return x.view(b, heads, 1, -1) if t == 1 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_joined(x: Tensor, tokens: int) -> Tensor:
    """What the operator gives of so many tokens in _layout -> [B, T, H*D]."""
    return x.view(x.shape[0], 1, -1) if tokens == 1 else x.flatten(2)
