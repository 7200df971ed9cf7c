"""Where ranks meet."""

from __future__ import annotations

from .rules import TRANSFORMER, Fault, card_rule
from .tensors import NodeView

_HCOM = ("HcomAllReduce", "HcomAllGather")
_DOCS = "Ascend/op-plugin: docs/zh/custom_APIs/torch_npu/torch_npu-npu_mm_all_reduce_base.md, and HCCL's documentation"
_REDUCED = f"{TRANSFORMER}: mc2/matmul_all_reduce/op_host/op_tiling/matmul_all_reduce_tiling.cpp"


@card_rule(
    "hccl.dtype",
    *_HCOM,
    what="HCCL sums and gathers float32, float16 and whole numbers, and bfloat16 on the 910B",
    source=_DOCS,
    remedy="cast before ranks meet",
)
def dtype(node: NodeView) -> Fault:
    dtype = node.dtype("x")
    allowed = ("float32", "float16", "bfloat16", "int8", "int16", "int32", "int64")
    return f"x in {dtype}" if dtype not in (None, *allowed) else None


@card_rule(
    "hccl.bfloat16",
    *_HCOM, "MatmulAllReduce",
    what="ranks of this chip meet in float16 or float32",
    cards=("310P",),
    source=_DOCS,
    remedy="compile with --dtype float16",
)  # fmt: skip
def bfloat16(node: NodeView) -> Fault:
    dtype = node.dtype("x") or node.dtype("x1")
    return "x in bfloat16" if dtype == "bfloat16" else None


@card_rule(
    "hccl.ranks",
    "MatmulAllReduce",
    what="the product that ends in a sum over ranks serves 1, 2, 4 or 8 of them",
    cards=("910B",),
    source=_REDUCED,
    remedy="use MatMul and HcomAllReduce for other numbers of ranks",
)
def ranks(node: NodeView) -> Fault:
    _, marker, given = str(node.attribute("group", "")).partition("rank_list=")
    count = len(given.split(","))
    return f"{count} ranks" if marker and count not in (1, 2, 4, 8) else None
