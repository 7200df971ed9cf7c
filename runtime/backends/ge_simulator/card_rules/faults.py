"""Known faults of operators on cards: public reports, the versions that they name, and the form of a node that meets them."""

from __future__ import annotations

from .attention import FIA, sizes
from .rules import Fault, card_rule
from .tensors import NodeView

_ISSUES = "vllm-project/vllm-ascend: issue"
_MASK_KEYS = 512  # so many keys were masked rightly


def _mask(node: NodeView) -> bool:
    return node.source("atten_mask") is not None and node.attribute("sparse_mode", 0) in (0, 1)


@card_rule(
    "fault.mask_beyond_512_keys",
    FIA,
    what="with one query a row, a mask was ignored beyond key 512, without an error",
    severity="warning",
    cann="seen with torch_npu 2.10 in bfloat16, paged; open in 2026-09",
    source=f"{_ISSUES} 15503",
    remedy="test it on the card first; around it: lengths in place of a mask, or two rows of queries",
    known_fault=True,
    cards=("910B",),
)
def mask_beyond_512_keys(node: NodeView) -> Fault:
    call = sizes(node)
    if call is None or not _mask(node) or call.queries != 1 or call.keys <= _MASK_KEYS:
        return None
    return f"a mask over {call.keys} keys"


@card_rule(
    "fault.query_without_keys",
    FIA,
    what="a query that sees no key gets zeros only with inner_precise 2 or 3; in modes 0 and 1 a card promises nothing",
    severity="warning",
    cann="all",
    source="Ascend/op-plugin: docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md",
    remedy="let such a query see something, or do not read its row",
    known_fault=True,
    cards=("910B",),
)
def query_without_keys(node: NodeView) -> Fault:
    return "a mask that values decide" if _mask(node) and node.attribute("inner_precise", 0) in (0, 1) else None


@card_rule(
    "fault.padded_batch",
    FIA,
    what="a batch whose padded rows have no lengths or no line of block_table stops with error 561002",
    severity="warning",
    cann="not stated; seen in 2026-04",
    source=f"{_ISSUES}s 8107, 8183 and 8523",
    remedy="give padded rows the length 1 and the block 0",
    known_fault=True,
    cards=("910B",),
)
def padded_batch(node: NodeView) -> Fault:
    query, given = node.shape("query"), node.shape("actual_seq_lengths_kv")
    if query is None or given is None or query[0] == 1 or not given:
        return None
    table = node.shape("block_table")
    short = given[0] != query[0] or (table is not None and table[0] != query[0])
    return f"{given[0]} lengths for {query[0]} rows" if short else None


@card_rule(
    "fault.shift_of_all_heads",
    FIA,
    what="a pse_shift with one head for all was taken without an error and gave wrong results at every length",
    severity="warning",
    cann="seen with torch_npu 2.10; open in 2026-09",
    source=f"{_ISSUES} 15503",
    remedy="expand the shift to all heads, [B, N, Q, S]",
    known_fault=True,
    cards=("910B",),
)
def shift_of_all_heads(node: NodeView) -> Fault:
    shift, heads = node.shape("pse_shift"), node.attribute("num_heads", 0)
    return (
        f"pse_shift {list(shift)} for {heads} heads" if shift and heads > 1 and (len(shift) < 4 or shift[1] != heads) else None
    )


@card_rule(
    "fault.packed_without_mask",
    FIA,
    what="in the layout TND with sparse_mode 0 and no mask every query got the mean of all values",
    severity="warning",
    cann="seen with torch_npu 2.10; open in 2026-08",
    source=f"{_ISSUES} 13699",
    remedy="use BSH or BNSD, or a mask with sparse_mode 3",
    known_fault=True,
    cards=("910B",),
)
def packed_without_mask(node: NodeView) -> Fault:
    layout = str(node.attribute("input_layout", "BSH"))
    plain = node.attribute("sparse_mode", 0) == 0 and node.source("atten_mask") is None
    return f"the layout {layout} without a mask" if layout.startswith("TND") and plain else None


@card_rule(
    "fault.int8_products_310p",
    "QuantBatchMatmulV3",
    what="graphs with the operator stopped on the 310P: a layout that differs from the compiled one, a conflict in L0C",
    severity="warning",
    cann="9.0.0, 9.1.0-beta.1",
    source=f"{_ISSUES}s 9769 and 17082",
    remedy="run the graph op by op (--eager)",
    known_fault=True,
    cards=("310P",),
)
def int8_products_310p(node: NodeView) -> Fault:
    return "a product of whole numbers"
