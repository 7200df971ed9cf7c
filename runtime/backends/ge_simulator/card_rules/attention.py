"""Fused attention: what its two kernels take, one for several queries and one for a single one.

B rows, N query heads, K kv heads, Q queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rules import TRANSFORMER, Fault, card_rule
from .tensors import NodeView

FIA = "FusedInferAttentionScore"
_FOLDER = f"{TRANSFORMER}: attention"
_DEFINITION = f"{_FOLDER}/fused_infer_attention_score/op_host/fused_infer_attention_score_def.cpp"
_TILING = f"{_FOLDER}/fused_infer_attention_score/op_host/fused_infer_attention_score_tiling.cpp"
_PAGE = f"{_FOLDER}/fused_infer_attention_score/docs/aclnnFusedInferAttentionScoreV4.md"
_MANY = f"{_FOLDER}/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp"
_ONE = f"{_FOLDER}/incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp"
_AXIS = {"BNSD": 2, "BSND": 1, "BSH": 1}  # of queries, and of keys in rows
_SIDE = 2048  # of the compressed mask
_MOST_INT8_QUERIES = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one call."""

    rows: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int


def sizes(node: NodeView) -> Sizes | None:
    """None where they are open, or the layout is none that we know."""
    query, key = node.shape("query"), node.shape("key0")
    heads = node.attribute("num_heads", 0)
    kv_heads = node.attribute("num_key_value_heads", 0) or heads
    layout = str(node.attribute("input_layout", "BSH")).partition("_")[0]
    paged = node.source("block_table") is not None
    if query is None or key is None or not heads or len(query) != (len(layout) if layout in _AXIS else 0):
        return None
    if not paged and len(query) != len(key):
        return None
    keys = _page_positions(node) if paged else key[_AXIS[layout]]
    width = query[2] // heads if layout == "BSH" else query[3]
    return None if keys is None else Sizes(query[0], heads, kv_heads, query[_AXIS[layout]], keys, width)


def _page_positions(node: NodeView) -> int | None:
    """Positions of a row whose keys lie in pages."""
    table = node.shape("block_table")
    return table[1] * node.attribute("block_size", 0) if table and len(table) == 2 else None


def _both(node: NodeView) -> tuple[Sizes, tuple[int, ...]] | None:
    """Sizes and the mask's shape, for a call with an uncompressed mask."""
    call, mask = sizes(node), node.shape("atten_mask")
    plain = node.attribute("sparse_mode", 0) in (0, 1)
    return (call, mask) if call and mask is not None and plain else None


@card_rule(
    "fia.card",
    FIA,
    what="the operator is registered for the chips 910B and 910_93 alone",
    cards=("310P",),
    source=_DEFINITION,
    remedy="run graphs with attention op by op (--eager) on this card",
)
def card(node: NodeView) -> Fault:
    return "fused attention"


@card_rule(
    "fia.heads",
    FIA,
    what="query heads are a multiple of kv heads, at most 64 to one, with at most 256 kv heads",
    cards=("910B",),
    source=_ONE,
    remedy="share heads among ranks (--tp)",
)
def heads(node: NodeView) -> Fault:
    call = sizes(node)
    if call is None or (
        call.heads % call.kv_heads == 0 and call.heads // call.kv_heads <= 64 and call.kv_heads <= 256 and call.heads <= 256
    ):
        return None
    return f"{call.heads} query heads and {call.kv_heads} kv heads"


@card_rule(
    "fia.width",
    FIA,
    what="a head has a multiple of 16 elements (of 32 over int8 keys), at most 512",
    cards=("910B",),
    source=_TILING,
    remedy="fill heads up with zeros, in the projections' weights where possible",
)
def width(node: NodeView) -> Fault:
    call = sizes(node)
    multiple = 32 if node.dtype("key0") == "int8" else 16
    return f"heads of {call.width} elements" if call and (call.width % multiple or call.width > 512) else None


@card_rule(
    "fia.rows",
    FIA,
    what="at most 65536 rows of a batch",
    cards=("910B",),
    source=_ONE,
    remedy="use a smaller batch",
)
def rows(node: NodeView) -> Fault:
    call = sizes(node)
    return f"{call.rows} rows" if call and call.rows > 65536 else None


@card_rule(
    "fia.features",
    FIA,
    what="in the layouts BSH and BSND a row of all heads has fewer than 65535 elements, or results lose precision",
    cards=("910B",),
    source=_MANY,
    remedy="use the layout BNSD",
)
def features(node: NodeView) -> Fault:
    call = sizes(node)
    layout = str(node.attribute("input_layout", "BSH"))
    if call is None or not layout.startswith(("BSH", "BSND")) or call.heads * call.width < 65535:
        return None
    return f"{call.heads} heads of {call.width} in the layout {layout}"


@card_rule(
    "fia.mask_dtype",
    FIA,
    what="atten_mask is bool, int8 or uint8",
    cards=("910B",),
    source=_ONE,
    remedy="compare in the graph, so that the mask is bool",
)
def mask_dtype(node: NodeView) -> Fault:
    dtype = node.dtype("atten_mask")
    return f"atten_mask is {dtype}" if dtype not in (None, "bool", "int8", "uint8") else None


@card_rule(
    "fia.mask_rows",
    FIA,
    what="atten_mask has two to four axes, one row or all rows of the batch first, and covers all queries and keys",
    cards=("910B",),
    source=_MANY,
    remedy="broadcast the mask to [B, 1, Q, S]",
)
def mask_rows(node: NodeView) -> Fault:
    both = _both(node)
    if both is None or both[0].queries == 1:
        return None
    call, mask = both
    whole = len(mask) in (2, 3, 4) and mask[-2] >= call.queries and mask[-1] >= call.keys
    if whole and (len(mask) == 2 or mask[0] in (1, call.rows)):
        return None
    return f"atten_mask {list(mask)} for {call.rows} rows of {call.queries} queries and {call.keys} keys"


@card_rule(
    "fia.mask_one_query",
    FIA,
    what="with one query a row, atten_mask has the batch first and at least as many columns as there are keys",
    cards=("910B",),
    source=_ONE,
    remedy="broadcast the mask to [B, 1, 1, S]",
)
def mask_one_query(node: NodeView) -> Fault:
    both = _both(node)
    if both is None or both[0].queries != 1:
        return None
    call, mask = both
    fits = bool(mask) and mask[0] == call.rows and mask[-1] >= call.keys
    return None if fits else f"atten_mask {list(mask)} for {call.rows} rows of {call.keys} keys"


@card_rule(
    "fia.compressed_mask",
    FIA,
    what="sparse_mode 2, 3 and 4 take the compressed mask of 2048 x 2048",
    cards=("910B",),
    source=_MANY,
    remedy="give the upper triangle of 2048 x 2048",
)
def compressed_mask(node: NodeView) -> Fault:
    mode, mask = node.attribute("sparse_mode", 0), node.shape("atten_mask")
    if mode not in (2, 3, 4):
        return None
    if node.source("atten_mask") is None:
        return f"sparse_mode {mode} without atten_mask"
    one_axes = mask is not None and all(size == 1 for size in mask[:-2])
    return None if mask is None or (mask[-2:] == (_SIDE, _SIDE) and one_axes) else f"sparse_mode {mode} with {list(mask)}"


@card_rule(
    "fia.int8_one_query",
    FIA,
    what="with one query a row, scales of int8 keys and values are [1, K, 1, D], [1, K, D] or [1, K * D] in the query's type",
    cards=("910B",),
    source=_ONE,
    remedy="shape and cast the scales when weights are written",
)
def int8_one_query(node: NodeView) -> Fault:
    call = sizes(node)
    if call is None or call.queries != 1 or node.dtype("key0") != "int8":
        return None
    heads, width = call.kv_heads, call.width
    return _wrong_scales(node, [(1, heads, 1, width), (1, heads, width), (1, heads * width)])


def _wrong_scales(node: NodeView, allowed: Sequence[tuple[int, ...]]) -> Fault:
    for name in ("key_antiquant_scale", "value_antiquant_scale"):
        scale = node.input(name)
        if scale is None:
            return f"{name} is missing"
        if scale.shape is not None and scale.shape not in allowed:
            return f"{name} {list(scale.shape)}"
        if scale.dtype not in (None, node.dtype("query")):
            return f"{name} in {scale.dtype} with a query in {node.dtype('query')}"
    return None


@card_rule(
    "fia.int8_queries",
    FIA,
    what="scales of the channels of int8 keys serve one query a row, or as [K, 1, D], [K, D] or [K * D] up to 16 in bfloat16",
    cards=("910B",),
    source=_PAGE,
    remedy="dequantise keys and values before the operator",
)
def int8_queries(node: NodeView) -> Fault:
    call = sizes(node)
    if call is None or call.queries == 1 or node.dtype("key0") != "int8" or node.dtype("query") == "int8":
        return None
    if node.source("block_table") is not None:  # see pages.py
        return None
    if call.queries <= _MOST_INT8_QUERIES and node.dtype("query") == "bfloat16":
        heads, width = call.kv_heads, call.width
        return _wrong_scales(node, [(heads, 1, width), (heads, width), (heads * width,)])
    return f"{call.queries} queries in {node.dtype('query')}"


@card_rule(
    "fia.lengths",
    FIA,
    what="lengths are int64, one number or one for each row",
    cards=("910B",),
    source=_DEFINITION,
    remedy="cast lengths to int64, one for each row of the batch",
)
def lengths(node: NodeView) -> Fault:
    call = sizes(node)
    for name in ("actual_seq_lengths", "actual_seq_lengths_kv"):
        given = node.input(name)
        if given is None:
            continue
        if given.dtype not in (None, "int64"):
            return f"{name} in {given.dtype}"
        if call and given.shape is not None and given.shape not in ((), (1,), (call.rows,)):
            return f"{name} {list(given.shape)} for {call.rows} rows"
    return None
