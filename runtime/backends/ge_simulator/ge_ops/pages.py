"""Keys and values in pages, as fused attention takes them.

Sources: ops-transformer, attention/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md (PagedAttention) and the
checks of both tilings; op-plugin, the page of torch_npu.npu_fused_infer_attention_score.

B rows, K kv heads, D head dim, Z pages of P positions, W pages of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import UnsupportedError

MOST_POSITIONS = 512  # of a page
MANY_QUERIES = 128  # what P is a multiple of for several queries


def check_pages(
    query: Tensor, layout: str, key: list[Tensor], block_table: Tensor, block_size: int, lengths: Tensor | None
) -> None:
    """Raise UnsupportedError for pages that the operator does not take, or that a device reads without a check."""
    queries = query.shape[2 if layout == "BNSD" else 1]
    in_int8 = any(each.dtype == torch.int8 for each in key)
    multiple = MANY_QUERIES if queries > 1 else 32 if in_int8 else 16
    if not 0 < block_size <= MOST_POSITIONS or block_size % multiple:
        raise UnsupportedError(
            f"attribute block_size = {block_size} is not supported with {queries} queries of a row over {key[0].dtype}; "
            f"expected a multiple of {multiple} up to {MOST_POSITIONS}"
        )
    if in_int8 and (queries > 1 or layout != "BNSD"):
        raise UnsupportedError(
            f"query {list(query.shape)} in the layout {layout} over pages of int8 is not supported; expected one query a row "
            "in the layout BNSD"
        )
    if lengths is None:
        raise UnsupportedError("input block_table needs input actual_seq_lengths_kv")
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or len(block_table) != len(query):
        raise UnsupportedError(
            f"input block_table is {block_table.dtype} {list(block_table.shape)}; expected int32 [{len(query)}, W]"
        )


def gathered(pages: Tensor, block_table: Tensor, block_size: int, kv_heads: int, layout: str) -> Tensor:
    """Pages [Z, P, K*D], or for queries in the layout BNSD [Z, K, P, D] too -> those of each row, joined: [B, K, W*P, D].

    An id out of range is an error here, also where no length reaches it: a device does not check ids.
    """
    table = block_table.long()
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < len(pages):
        raise UnsupportedError(f"block_table names pages {int(table.min())} to {int(table.max())}; there are {len(pages)}")
    if pages.dim() == 3 and pages.shape[1] == block_size and pages.shape[2] % kv_heads == 0:
        heads_first = pages.unflatten(2, (kv_heads, -1)).transpose(1, 2)
    elif pages.dim() == 4 and layout == "BNSD" and pages.shape[1:3] == (kv_heads, block_size):
        heads_first = pages
    else:
        raise UnsupportedError(
            f"pages {list(pages.shape)} do not fit block_size {block_size} and {kv_heads} heads in the layout {layout}; "
            "expected [Z, P, K * D], or with BNSD [Z, K, P, D]"
        )
    return heads_first[table].transpose(1, 2).flatten(2, 3)  # [B, W, K, P, D] -> [B, K, W, P, D] -> [B, K, W * P, D]
