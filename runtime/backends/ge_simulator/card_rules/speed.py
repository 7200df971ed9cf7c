"""Forms that a card computes slowly: warnings, each with the form that is faster."""

from __future__ import annotations

import math

from ..ge_graph import INPUT_TYPES
from . import shapes
from .attention import FIA, sizes
from .products import W8
from .rules import GE, NN, TRANSFORMER, Fault, card_rule
from .tensors import PREPARING, VIEWS, WEIGHT_INPUTS, NodeView

_SQUEEZED = f"{GE}: compiler/graph/passes/format_optimize/dim1_transpose_to_squeeze_pass.cc"
_MSD = f"{NN}: matmul/weight_quant_batch_matmul_v2/op_host/op_tiling/weight_quant_batch_matmul_v2_tiling_msd.cpp"
_MSD_GROUP = f"{NN}: matmul/weight_quant_batch_matmul_v2/op_host/op_tiling/weight_quant_batch_matmul_v2_tiling_msd_group.cpp"
_TILING = f"{TRANSFORMER}: attention/fused_infer_attention_score/op_host/fused_infer_attention_score_tiling.cpp"
_FUSIONS = f"{GE}: tests/engines/nn_engine/depends/CANN_910b_stub/cann/opp/built-in/fusion_pass/config/fusion_config.json"
_FEW_ROWS = 64  # so many rows of M a fast template takes
_ARITHMETIC = ("Add", "Cast", "Div", "Exp", "Mul", "Neg", "RealDiv", "Reciprocal", "Rsqrt", "Sqrt", "Square", "Sub")
_SMALL = 1 << 12  # elements: below it an operator costs its start alone


@card_rule(
    "slow.transpose",
    "Transpose",
    what="an axis larger than 1 moves: a copy of the tensor",
    severity="warning",
    source=_SQUEEZED,
    remedy="choose a layout that needs no transposition: BSH or BSND for attention, rows in two axes for products",
    cards=("910B",),
)
def transpose(node: NodeView) -> Fault:
    shape, order = node.shape("x"), node.input("perm")
    if shape is None or order is None or order.values is None or node.node.name in node.graph.fixed or _taken_in(node):
        return None
    moved = [axis for axis in order.values if shape[axis] > 1]
    return None if moved == sorted(moved) else f"{list(shape)} in the order {list(order.values)}"


def _taken_in(node: NodeView) -> bool:
    """Whether all readers are products that read a transposed operand as it lies."""
    return bool(node.readers) and all(reader.type in (W8, "MatMul", "MatMulV2") for reader in node.readers)


@card_rule(
    "slow.weight_prepared",
    *WEIGHT_INPUTS,
    what="a weight is cut, filled up, joined or transposed in every step",
    severity="warning",
    source=_SQUEEZED,
    remedy="write the weight as the operator reads it",
    cards=("910B",),
)
def weight_prepared(node: NodeView) -> Fault:
    for name in WEIGHT_INPUTS[node.node.type]:
        made = node.producer(name)
        if made is not None and made.node.name in node.graph.fixed:
            reason = _prepared(made, node.node.type == W8)
            if reason:
                return f"{name} by {reason}"
    return None


def _prepared(made: NodeView, transposed: bool) -> Fault:
    """The operator that copies a weight; `transposed`: the reader takes in a transposition right before it."""
    if transposed and made.node.type == "Transpose":
        made = made.graph.view(made.node.inputs[0].producer) if made.node.inputs[0] else made
    while made.node.type in (*VIEWS, *PREPARING):
        large = math.prod(made.output().shape or ()) >= _SMALL
        if made.node.type not in (*VIEWS, "Cast", "Reciprocal", "TransQuantParamV2", "TensorMove") and large:
            return f"{made.node.type} {made.node.name}"
        source = made.node.inputs[0]
        if source is None:
            return None
        made = made.graph.view(source.producer)
    return None


@card_rule(
    "slow.constant_arithmetic",
    *_ARITHMETIC,
    what="weights and constants alone go in, so every step computes the same",
    severity="warning",
    source=f"{GE}: compiler/graph/passes (weights are no constants, and are not folded)",
    remedy="compute it when weights are written",
    cards=("910B",),
)
def constant_arithmetic(node: NodeView) -> Fault:
    graph, name = node.graph, node.node.name
    return f"{node.output()}" if name in graph.fixed and name not in graph.constant else None


@card_rule(
    "slow.cache_joined",
    FIA,
    what="keys of several images are joined by a copy in every step",
    severity="warning",
    source=_TILING,
    remedy="keep the images of a request in one piece, or read pages (block_table)",
    cards=("910B",),
)
def cache_joined(node: NodeView) -> Fault:
    source = node.source("key0")
    joined = node.graph.origin_of(source, *VIEWS) if source else None
    if joined is None or joined.node.type not in ("ConcatV2", "ConcatD"):
        return None
    parts = [each for name, each in joined.fed if name != "concat_dim"]
    if any(node.graph.view(each.producer).node.type not in INPUT_TYPES for each in parts):
        return None
    return f"{len(parts)} images, {joined.output()}"


@card_rule(
    "slow.attention_without_lengths",
    FIA,
    what="one query a row without actual_seq_lengths_kv reads all keys, however few count",
    severity="warning",
    source=_TILING,
    remedy="give the lengths of keys as a tensor",
    cards=("910B",),
)
def attention_without_lengths(node: NodeView) -> Fault:
    call = sizes(node)
    if call is None or call.queries != 1 or node.source("actual_seq_lengths_kv") is not None:
        return None
    return f"{call.keys} keys in each of {call.rows} rows"


@card_rule(
    "slow.w8_template",
    W8,
    what="decode's fast template takes one scale a column in 8 bits, and groups of 64 or 128 untransposed in 4 bits, of "
    "multiples of 32 (64) features; the general one widens the weight first",
    severity="warning",
    source=f"{_MSD}, {_MSD_GROUP}",
    remedy="quantise 8 bits with one scale a column, and pack 4 bits along the out features",
    cards=("910B",),
)
def w8_template(node: NodeView) -> Fault:
    x, weight = node.shape("x"), node.shape("weight")
    if x is None or weight is None or len(x) != 2 or len(weight) != 2 or x[0] > _FEW_ROWS:
        return None
    inputs = {name: node.graph.tensor(source) for name, source in node.fed}
    depth, columns = x[1], shapes.weight_columns(node.node, inputs)
    made, group = node.producer("weight"), node.attribute("antiquant_group_size", 0)
    transposed = bool(node.attribute("transpose_weight")) or (made is not None and made.node.type == "Transpose")
    if node.dtype("weight") == "int32":
        wrong = transposed or group not in (64, 128) or x[0] > group // 8 or depth % group or columns % 64
        bits = 4
    else:
        wrong, bits = group or depth % 32 or columns % 32, 8
    way = " transposed" if transposed else ""
    return f"{x[0]} rows, {depth} x {columns} in {bits} bits,{way} groups of {group}" if wrong else None


@card_rule(
    "slow.norm_reshaped",
    "DynamicQuant",
    what="a Reshape between a norm and DynamicQuant keeps AddRmsNormDynamicQuantFusionPass from joining them",
    severity="warning",
    source=_FUSIONS,
    remedy="keep rows in two axes through a layer, or use AddRmsNormDynamicQuant",
    cards=("910B",),
)
def norm_reshaped(node: NodeView) -> Fault:
    made, source = node.producer("x"), node.source("x")
    if made is None or source is None or made.node.type != "Reshape":
        return None
    norm = node.graph.origin_of(source, *VIEWS)
    return f"{norm.node.type} {norm.node.name}" if norm.node.type in ("RmsNorm", "AddRmsNorm") else None


@card_rule(
    "slow.separate_collective",
    "HcomAllReduce",
    what="a product and the sum over ranks that follows it run one after the other",
    severity="warning",
    source=f"{TRANSFORMER}: mc2/matmul_all_reduce/op_host/matmul_all_reduce_def.cpp",
    remedy="use MatmulAllReduce, which sends a part while it computes the next, for 2, 4 or 8 ranks",
    cards=("910B",),
)
def separate_collective(node: NodeView) -> Fault:
    source = node.source("x")
    product = node.graph.origin_of(source, *VIEWS) if source else None
    return f"after {product.node.type}" if product is not None and product.node.type in ("MatMul", "MatMulV2") else None


@card_rule(
    "slow.padded_at_run_time",
    "PadV3", "Pad",
    what="heads or rows are filled up with zeros in every step",
    severity="warning",
    source=_TILING,
    remedy="fill up the weights that make them when they are written",
    cards=("910B",),
)  # fmt: skip
def padded_at_run_time(node: NodeView) -> Fault:
    made = node.output()
    if node.node.name in node.graph.fixed or math.prod(made.shape or ()) < _SMALL:
        return None
    source = node.source("x")
    product = node.graph.origin_of(source, *VIEWS).node if source else None
    return (
        f"{made} after {product.type}" if product is not None and product.type in ("MatMul", W8, "QuantBatchMatmulV3") else None
    )
