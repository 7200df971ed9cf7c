"""Attention over caches in pages.

B rows, T tokens, H query heads, K kv heads, D head dim, Z pages of P tokens, W pages of a row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import RIGHT_DOWN_CAUSAL, Pair, causal_triangle, fused_attention, heads_first, heads_joined, rounded
from .operators import aten, npu

AS_DECLARED = "Norm"  # cache_mode: the cache lies as its shape says; torch_npu's default is another layout


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One ScatterPaKvCache for keys and values, then fused attention, which reads the pages that a row's table names.

    A chunk counts as whole, its padding included: where padding is in no page of the row, the operator reads what lies there.
    Only padding sees it.
    """
    caches = _written((k_cache, v_cache), (k, v), slot_mapping)
    return _over_pages(q, caches, lengths, block_table, heads), *caches


def int8_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over pages of int8, scales being [K, 1, D]."""
    steps = (k_scale.float().flatten(), v_scale.float().flatten())
    places = (lengths, block_table, slot_mapping)
    return over_int8_pages(q, (k, v), (k_cache, v_cache), (k_scale, v_scale), steps, places, heads)


def over_int8_pages(
    q: Tensor, new: Pair, caches: Pair, scales: Pair, steps: Pair, places: tuple[Tensor, Tensor, Tensor], heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the scales twice, as in attention.over_int8_caches; `places` are lengths, block_table and slot_mapping.

    One token of each row reads the pages with their scales. For several, the pages of the rows are gathered and dequantised, a
    copy that lives as long as the layer.
    """
    lengths, block_table, slot_mapping = places
    k_new, v_new = (rounded(x, step) for x, step in zip(new, steps, strict=True))
    caches = _written(caches, (k_new, v_new), slot_mapping)
    k_scale, v_scale = scales
    if q.shape[1] == 1:
        taken = {"key_antiquant_scale": k_scale[None], "value_antiquant_scale": v_scale[None]}  # [1, K, 1, D]
        return _over_pages(q, caches, lengths, block_table, heads, **taken), *caches
    k_rows, v_rows = (_rows(cache, block_table, scale, q) for cache, scale in zip(caches, scales, strict=True))
    return _attended(q, (k_rows, v_rows), lengths, heads, k_rows.shape[2]), *caches


def _written(caches: Pair, new: Pair, slot_mapping: Tensor) -> Pair:
    """new [B, T, K*D] at the places `slot_mapping` of the pages [Z, P, K, D]."""
    k, v = (x.view(-1, *cache.shape[2:]) for x, cache in zip(new, caches, strict=True))
    k_cache, v_cache = npu.npu_scatter_pa_kv_cache_functional.default(
        k, v, *caches, slot_mapping.flatten(), cache_mode=AS_DECLARED
    )
    return k_cache, v_cache


def _over_pages(q: Tensor, caches: Pair, lengths: Tensor, block_table: Tensor, heads: int, **scales: Tensor) -> Tensor:
    """Fused attention over pages, which it takes as [Z, P, K*D]."""
    page, kv_heads = caches[0].shape[1:3]
    k_pages, v_pages = (each.flatten(2) for each in caches)
    return _attended(q, (k_pages, v_pages), lengths, heads, kv_heads, block_table=block_table, block_size=page, **scales)


def _rows(pages: Tensor, block_table: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """The values of the pages of each row, joined: [B, W*P, K, D] in the type of `like`."""
    rows = aten.index_select.default(pages, 0, block_table.flatten())  # [B*W, P, K, D]
    return (rows.to(like.dtype) * scale.flatten(0, 1)).view(block_table.shape[0], -1, *pages.shape[2:])


def _attended(q: Tensor, kv: Pair, lengths: Tensor, heads: int, kv_heads: int, **more: Any) -> Tensor:
    """Fused attention of q [B, T, H*D] to all positions of a row up to its own, those at `lengths` and on.

    The layout BNSD of one token is a view, and its kernel is the faster; several stay as they are.
    """
    t, d = q.shape[1], q.shape[2] // heads
    mask: dict[str, Any] = {"input_layout": "BNSD"}
    if t > 1:
        mask = {"input_layout": "BSND", "atten_mask": causal_triangle(q.device), "sparse_mode": RIGHT_DOWN_CAUSAL}
    queries = heads_first(q, heads) if t == 1 else q.unflatten(-1, (heads, d))
    actual = (lengths + t).long()
    arguments = {"actual_seq_lengths_kv": actual, "num_key_value_heads": kv_heads, **mask, **more}
    return heads_joined(fused_attention(queries, *kv, heads, d, **arguments), t)
