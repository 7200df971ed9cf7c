"""Matrix products and quantisation.

M rows, K in features, N out features.
"""

from __future__ import annotations

from . import shapes
from .rules import NN, TRANSFORMER, Fault, card_rule
from .tensors import NodeView

_MATMUL = f"{NN}: matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp"
_W8 = f"{NN}: matmul/weight_quant_batch_matmul_v2/op_host/op_tiling/weight_quant_batch_matmul_v2_tiling.cpp"
_W8_DEFINITION = f"{NN}: matmul/weight_quant_batch_matmul_v2/op_host/weight_quant_batch_matmul_v2_def.cpp"
_INT8 = f"{NN}: matmul/quant_batch_matmul_v3/op_host/op_tiling/quant_batch_matmul_v3_tiling.cpp"
_INT8_DEFINITION = f"{NN}: matmul/quant_batch_matmul_v3/op_host/quant_batch_matmul_v3_def.cpp"
_REDUCED = f"{TRANSFORMER}: mc2/matmul_all_reduce/op_host/op_tiling/matmul_all_reduce_tiling.cpp"
_MOST = 65535
_HALVES = ("float16", "bfloat16")
W8, INT8 = "WeightQuantBatchMatmulV2", "QuantBatchMatmulV3"


@card_rule(
    "matmul.sizes",
    "MatMul", "MatMulV2",
    what="both operands are matrices whose inner sizes agree",
    source=_MATMUL,
    remedy="flatten rows before the product",
)  # fmt: skip
def matmul_sizes(node: NodeView) -> Fault:
    left, right = node.shape("x1"), node.shape("x2")
    if left is None or right is None:
        return None
    if len(left) == len(right) == 2:
        inner = left[0 if node.attribute("transpose_x1") else 1], right[1 if node.attribute("transpose_x2") else 0]
        if inner[0] == inner[1]:
            return None
    return f"x1 {list(left)} and x2 {list(right)}"


@card_rule(
    "matmul.operands",
    "MatMul", "MatMulV2",
    what="both operands are of one dtype, and a bias is of that dtype or float32",
    source=_MATMUL,
    remedy="cast weights and biases when they are written",
)  # fmt: skip
def matmul_operands(node: NodeView) -> Fault:
    x, weight, bias = node.dtype("x1"), node.dtype("x2"), node.dtype("bias")
    if x and weight and x != weight:
        return f"x1 in {x} and x2 in {weight}"
    return f"bias in {bias} with {x}" if bias not in (None, x, "float32") else None


@card_rule(
    "matmul.layout",
    "MatMul", "MatMulV2",
    what="a compiled product takes its weight in FRACTAL_NZ, into which the graph engine has to bring it",
    severity="warning",
    cards=("310P",),
    source=_MATMUL,
    remedy="run the graph op by op (--eager) on this card",
)  # fmt: skip
def matmul_layout(node: NodeView) -> Fault:
    dtype = node.dtype("x2")
    return f"x2 in {dtype}, ND" if dtype in _HALVES else None


# ---- weights in 8 and 4 bits


@card_rule(
    "w8.card",
    W8,
    what="this chip takes weights in int8, FRACTAL_NZ, with one scale a column",
    cards=("310P",),
    source=_W8_DEFINITION,
    remedy="run the graph op by op (--eager), which dequantises weights",
)
def w8_card(node: NodeView) -> Fault:
    return f"weight in {node.dtype('weight')}, ND"


@card_rule(
    "w8.rows",
    W8,
    what="x and weight have two axes",
    source=_W8,
    remedy="flatten rows before the product",
)
def w8_rows(node: NodeView) -> Fault:
    shapes_ = [(name, node.shape(name)) for name in ("x", "weight")]
    return next((f"{name} {list(shape)}" for name, shape in shapes_ if shape is not None and len(shape) != 2), None)


def _depth(node: NodeView) -> tuple[int, int] | None:
    """K and N of a product with weights in 8 or 4 bits; None where they are open."""
    x, weight = node.shape("x"), node.shape("weight")
    if x is None or weight is None or len(x) != 2 or len(weight) != 2:
        return None
    inputs = {name: node.graph.tensor(source) for name, source in node.fed}
    return x[0 if node.attribute("transpose_x") else 1], shapes.weight_columns(node.node, inputs)


@card_rule(
    "w8.features",
    W8,
    what="in and out features are at most 65535",
    source=_W8,
    remedy="cut the weight into pieces when it is written",
)
def w8_features(node: NodeView) -> Fault:
    sizes = _depth(node)
    return f"{sizes[0]} in features, {sizes[1]} out features" if sizes and max(sizes) > _MOST else None


@card_rule(
    "w8.group",
    W8,
    what="a group is a multiple of 32 in features and smaller than all of them, or 0 for one scale a column",
    source=_W8,
    remedy="quantise in groups of 32, 64 or 128, or per column",
)
def w8_group(node: NodeView) -> Fault:
    group, sizes = node.attribute("antiquant_group_size", 0), _depth(node)
    if sizes is None or not group or (group % 32 == 0 and 0 < group < sizes[0]):
        return None
    return f"groups of {group} of {sizes[0]} in features"


@card_rule(
    "w8.scales",
    W8,
    what="scales are [K / group, N] for groups, transposed with the weight, or [N] or [1, N]; offsets have their shape",
    source=_W8,
    remedy="shape scales when weights are written",
)
def w8_scales(node: NodeView) -> Fault:
    sizes, scale, offset = _depth(node), node.shape("antiquant_scale"), node.shape("antiquant_offset")
    group = node.attribute("antiquant_group_size", 0)
    if sizes is None or scale is None:
        return None
    depth, columns = sizes
    whole = (-(-depth // group), columns) if group else (1, columns)
    allowed = {whole[::-1] if node.attribute("transpose_weight") else whole, *(() if group else ((columns,), (1,)))}
    if scale not in allowed:
        return f"antiquant_scale {list(scale)} for {depth} x {columns} in groups of {group}"
    return None if offset in (None, scale) else f"antiquant_offset {list(offset)} with scales {list(scale)}"


@card_rule(
    "w8.bias",
    W8,
    what="a bias is float32 for x in bfloat16, and float16 for x in float16",
    source=_W8,
    remedy="cast the bias when weights are written",
)
def w8_bias(node: NodeView) -> Fault:
    bias, x = node.dtype("bias"), node.dtype("x")
    return f"bias in {bias} with x in {x}" if bias and x and bias != {"bfloat16": "float32"}.get(x, x) else None


@card_rule(
    "w8.even",
    W8,
    what="the inner axis of a weight in 4 bits is even, eight numbers to an int32",
    source=_W8,
    remedy="fill the weight up when it is written",
)
def w8_even(node: NodeView) -> Fault:
    sizes, weight = _depth(node), node.shape("weight")
    if sizes is None or node.dtype("weight") != "int32" or not weight:
        return None
    depth, columns = sizes
    rows = weight[1] if node.attribute("transpose_weight") else weight[0]
    if rows in (depth, depth // 8) and depth % 8 == 0 if rows != depth else columns % 8 == 0:
        return None
    return f"weight {list(weight)} of int32 for {depth} in features"


# ---- whole-number products


@card_rule(
    "int8.card",
    INT8,
    what="this chip takes weights in FRACTAL_NZ alone, and no scale for each row with a plain layout",
    cards=("310P",),
    source=_INT8_DEFINITION,
    remedy="run the graph op by op (--eager), which dequantises weights",
)
def int8_card(node: NodeView) -> Fault:
    return f"x2 in {node.dtype('x2')}, ND"


@card_rule(
    "int8.scale",
    INT8,
    what="a result in float16 takes scales in float32 (or packed in 64 bits), one in bfloat16 scales in bfloat16 or float32",
    cards=("910B",),
    source=_INT8,
    remedy="keep scales in float32",
)
def int8_scale(node: NodeView) -> Fault:
    out, scale = node.output().dtype, node.dtype("scale")
    packed = ("uint64", "int64")
    allowed = {"float16": ("float32", *packed), "bfloat16": ("bfloat16", "float32", *packed)}.get(out or "")
    return f"scale in {scale} for a result in {out}" if allowed and scale and scale not in allowed else None


@card_rule(
    "int8.bias",
    INT8,
    what="a bias is int32, float32, or of the result's own 16 bits",
    cards=("910B",),
    source=_INT8,
    remedy="cast the bias when weights are written",
)
def int8_bias(node: NodeView) -> Fault:
    out, bias = node.output().dtype, node.dtype("bias")
    if bias is None or out not in _HALVES or bias in ("int32", "float32", out):
        return None
    return f"bias in {bias} for a result in {out}"


@card_rule(
    "int8.sizes",
    INT8,
    what="inner sizes agree, scales are one or one for each column, and row scales one for each row",
    cards=("910B",),
    source=_INT8,
    remedy="shape scales when weights are written",
)
def int8_sizes(node: NodeView) -> Fault:
    left, right, scale, rows = (node.shape(name) for name in ("x1", "x2", "scale", "pertoken_scale"))
    if left is None or right is None:
        return None
    left = (*left[:-2], left[-1], left[-2]) if node.attribute("transpose_x1") else left
    right = (*right[:-2], right[-1], right[-2]) if node.attribute("transpose_x2") else right
    if left[-1] != right[-2]:
        return f"x1 {list(left)} and x2 {list(right)}"
    if scale is not None and scale not in ((1,), (right[-1],)):
        return f"scale {list(scale)} for {right[-1]} columns"
    return f"pertoken_scale {list(rows)} for {left[-2]} rows" if rows is not None and rows != (left[-2],) else None


@card_rule(
    "quant.rows",
    "DynamicQuant",
    what="rows of 16-bit floats have a multiple of 32 elements on this chip, in float16",
    cards=("310P",),
    source=f"{NN}: quant/dynamic_quant/op_host/dynamic_quant_def.cpp",
    remedy="run the graph op by op (--eager)",
)
def quant_rows(node: NodeView) -> Fault:
    x = node.input("x")
    if x is None or (x.dtype == "float16" and x.shape is not None and x.shape[-1] % 32 == 0):
        return None
    return f"x {x}"


@card_rule(
    "swiglu.halves",
    "SwiGlu", "DequantSwigluQuant",
    what="the axis that is halved is even",
    source=f"{NN}: activation/swi_glu/op_host/swi_glu_tiling.cpp",
    remedy="fill features up when weights are written",
)  # fmt: skip
def swiglu_halves(node: NodeView) -> Fault:
    shape = node.shape("x")
    axis = node.attribute("dim", -1)
    return f"axis {axis} of {list(shape)}" if shape and shape[axis] % 2 else None


@card_rule(
    "matmul_reduce.sizes",
    "MatmulAllReduce",
    what="in features are at most 65535, and x2 is a matrix that fits x1",
    cards=("910B",),
    source=_REDUCED,
    remedy="use MatMul and HcomAllReduce",
)
def matmul_reduce_sizes(node: NodeView) -> Fault:
    left, right = node.shape("x1"), node.shape("x2")
    if left is None or right is None:
        return None
    depth = left[-1]
    inner = right[1 if node.attribute("is_trans_b") else 0] if len(right) == 2 else None
    return f"x1 {list(left)} and x2 {list(right)}" if depth > _MOST or inner != depth else None
