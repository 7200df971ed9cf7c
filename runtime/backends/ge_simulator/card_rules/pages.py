"""Keys and values in pages: what attention takes, and the operator that writes them.

B rows, T tokens, K kv heads, D head dim, Z pages of P positions, W pages of a row.
"""

from __future__ import annotations

from .attention import FIA, sizes
from .rules import GE, TRANSFORMER, Fault, card_rule
from .tensors import NodeView

_FOLDER = f"{TRANSFORMER}: attention"
_PAGE = f"{_FOLDER}/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md"
_MANY = f"{_FOLDER}/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"
_ONE = f"{_FOLDER}/incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp"
_LIMITS = "Ascend/op-plugin: docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md"
_SCATTER_PAGE = "Ascend/op-plugin: docs/zh/custom_APIs/torch_npu/torch_npu-npu_scatter_pa_kv_cache.md"
_SCATTER_TEST = "Ascend/op-plugin: test/test_custom_ops/test_scatter_pa_kv_cache.py"
_SCATTER_TYPES = f"{GE}: tests/engines/nn_engine/depends/CANN_910b_stub (ScatterPaKvCache)"
SCATTER = "ScatterPaKvCache"
_MOST_KEYS = 262144  # of a row
_MOST_ELEMENTS = 65535  # of all heads of a position


def _is_paged(node: NodeView) -> bool:
    return node.source("block_table") is not None


@card_rule(
    "fia.pages",
    FIA,
    what="pages hold at most 512 keys, a multiple of 16 (of 32 in int8) for one query a row, of 128 for several",
    cards=("910B",),
    source=f"{_ONE}; {_MANY}",
    remedy="use pages of 128 keys",
)
def pages(node: NodeView) -> Fault:
    if not _is_paged(node):
        return None
    call, size = sizes(node), node.attribute("block_size", 0)
    multiple = 128 if call and call.queries > 1 else 32 if node.dtype("key0") == "int8" else 16
    return None if 0 < size <= 512 and size % multiple == 0 else f"pages of {size} keys"


@card_rule(
    "fia.page_table",
    FIA,
    what="block_table is int32 with two axes, and has a line for each row of the batch",
    cards=("910B",),
    source=_PAGE,
    remedy="give a table of the padded batch",
)
def page_table(node: NodeView) -> Fault:
    table, query = node.input("block_table"), node.shape("query")
    if table is None or table.shape is None or query is None:
        return None
    fits = len(table.shape) == 2 and table.shape[0] == query[0] and table.dtype in (None, "int32")
    return None if fits else f"block_table {table.dtype} {list(table.shape)} for {query[0]} rows"


@card_rule(
    "fia.page_lengths",
    FIA,
    what="with block_table, actual_seq_lengths_kv has to be given",
    cards=("910B",),
    source=_PAGE,
    remedy="give the number of keys of each row",
)
def page_lengths(node: NodeView) -> Fault:
    missing = _is_paged(node) and node.source("actual_seq_lengths_kv") is None
    return "block_table without actual_seq_lengths_kv" if missing else None


@card_rule(
    "fia.page_keys",
    FIA,
    what=f"a row has at most {_MOST_KEYS} keys",
    cards=("910B",),
    source=_LIMITS,
    remedy="use a table of fewer columns",
)
def page_keys(node: NodeView) -> Fault:
    call = sizes(node)
    return f"a table of {call.keys} keys" if call and _is_paged(node) and call.keys > _MOST_KEYS else None


@card_rule(
    "fia.page_layout",
    FIA,
    what=f"pages are [Z, P, K * D] with K * D up to {_MOST_ELEMENTS}, or with queries in BNSD [Z, K, P, D]; all alike",
    cards=("910B",),
    source=_PAGE,
    remedy="see the cache as [Z, P, K * D], or share heads among ranks (--tp)",
)
def page_layout(node: NodeView) -> Fault:
    call, key, value = sizes(node), node.shape("key0"), node.shape("value0")
    if not _is_paged(node) or call is None or key is None:
        return None
    size, features = node.attribute("block_size", 0), call.kv_heads * call.width
    flat = key[1:] == (size, features) and features <= _MOST_ELEMENTS
    by_heads = str(node.attribute("input_layout", "BSH")).startswith("BNSD") and key[1:] == (call.kv_heads, size, call.width)
    return None if (flat or by_heads) and value in (None, key) else f"pages {list(key)} of keys, {list(value or ())} of values"


@card_rule(
    "fia.page_int8",
    FIA,
    what="of int8 pages with scales of channels, several queries a row are taken in no form that we know to be safe",
    cards=("910B",),
    source=f"{_MANY} (float16 in BSH and BSND alone); {_LIMITS} (bfloat16 alone)",
    remedy="dequantise the pages of the row before the operator",
)
def page_int8(node: NodeView) -> Fault:
    call = sizes(node)
    several = _is_paged(node) and call is not None and call.queries > 1 and node.dtype("key0") == "int8"
    return f"{call.queries} queries a row" if several and call else None


@card_rule(
    "scatter_pages.card",
    SCATTER,
    what="the operator is not supported on this chip",
    cards=("310P",),
    source=_SCATTER_PAGE,
    remedy="run graphs with a cache op by op (--eager) on this card",
)
def card(node: NodeView) -> Fault:
    return "a write into pages of the cache"


@card_rule(
    "scatter_pages.layout",
    SCATTER,
    what="cache_mode Norm is for caches that lie as their shape says; PA_NZ is for another format",
    cards=("910B",),
    source=_SCATTER_PAGE,
    remedy="give cache_mode Norm",
)
def layout(node: NodeView) -> Fault:
    mode = node.attribute("cache_mode", "Norm")
    return f"cache_mode {mode}" if mode != "Norm" else None


@card_rule(
    "scatter_pages.sizes",
    SCATTER,
    what="key and value are [T, K, D], the caches [Z, P, K, D] with the same heads",
    cards=("910B",),
    source=_SCATTER_TEST,
    remedy="reshape new keys and values to one row for each token",
)
def written_sizes(node: NodeView) -> Fault:
    for name in ("key", "value"):
        new, cache = node.shape(name), node.shape(f"{name}_cache")
        if new and cache and (len(new) != 3 or len(cache) != 4 or new[1:] != cache[2:]):
            return f"{name} {list(new)} and {name}_cache {list(cache)}"
    return None


@card_rule(
    "scatter_pages.slots",
    SCATTER,
    what="slot_mapping is int32 or int64 with a place for each token",
    cards=("910B",),
    source=f"{_SCATTER_PAGE}; {_SCATTER_TYPES}",
    remedy="give a place for each token, padding included",
)
def slots(node: NodeView) -> Fault:
    given, key = node.input("slot_mapping"), node.shape("key")
    if given is None or given.shape is None or key is None:
        return None
    fits = given.shape == (key[0],) and given.dtype in (None, "int32", "int64")
    return None if fits else f"slot_mapping {given.dtype} {list(given.shape)} for {key[0]} tokens"
