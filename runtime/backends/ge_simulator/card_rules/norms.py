"""Norms and rotary embedding."""

from __future__ import annotations

from .rules import NN, TRANSFORMER, Fault, card_rule
from .tensors import NodeView

_RMS = f"{NN}: norm/rms_norm/docs/aclnnRmsNorm.md"
_ADD_RMS = f"{NN}: norm/add_rms_norm/docs/aclnnAddRmsNorm.md"
_FUSED = ("AddRmsNorm", "AddRmsNormDynamicQuant")
_ROTARY = f"{TRANSFORMER}: posembedding/rotary_position_embedding/op_host/rope_rotate_half_tiling.cpp"
_APPLIED = f"{TRANSFORMER}: posembedding/apply_rotary_pos_emb/docs/aclnnApplyRotaryPosEmb.md"
_WIDEST = 896
_ROW_BYTES = 32
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@card_rule(
    "norm.gamma",
    "RmsNorm",
    what="gamma has the last axes of x, and is of its dtype or float32",
    source=_RMS,
    remedy="cast and shape gamma when weights are written",
)
def gamma(node: NodeView) -> Fault:
    x, weight = node.input("x"), node.input("gamma")
    if x is None or weight is None:
        return "gamma is missing"
    if weight.dtype not in (None, x.dtype, "float32"):
        return f"gamma in {weight.dtype} with x in {x.dtype}"
    fits = x.shape is None or weight.shape is None or x.shape[len(x.shape) - len(weight.shape) :] == weight.shape
    return None if fits else f"gamma {list(weight.shape or ())} with x {list(x.shape or ())}"


@card_rule(
    "norm.sum",
    *_FUSED,
    what="both summands have one shape and dtype, and gamma is of that dtype and of the last axes",
    cards=("910B",),
    source=_ADD_RMS,
    remedy="use Add and RmsNorm",
)
def norm_sum(node: NodeView) -> Fault:
    first, second, weight = node.input("x1"), node.input("x2"), node.input("gamma")
    if first is None or second is None or weight is None:
        return "an input is missing"
    if None not in (first.shape, second.shape) and first.shape != second.shape:
        return f"x1 {first} and x2 {second}"
    dtypes = {each.dtype for each in (first, second, weight) if each.dtype}
    if len(dtypes) > 1:
        return f"x1 in {first.dtype}, x2 in {second.dtype}, gamma in {weight.dtype}"
    fits = first.shape is None or weight.shape is None or first.shape[len(first.shape) - len(weight.shape) :] == weight.shape
    return None if fits else f"gamma {list(weight.shape or ())} with x1 {list(first.shape or ())}"


@card_rule(
    "norm.row",
    "RmsNorm", "AddRmsNorm",
    what="rows are of 32 bytes or more, in float16 or float32",
    cards=("310P",),
    source=_RMS,
    remedy="run the graph op by op (--eager)",
)  # fmt: skip
def norm_row(node: NodeView) -> Fault:
    x = node.input("x") or node.input("x1")
    if x is None or x.dtype is None or x.shape is None:
        return None
    return f"x {x}" if x.dtype == "bfloat16" or x.shape[-1] * _SIZES.get(x.dtype, 4) < _ROW_BYTES else None


@card_rule(
    "layernorm.affine",
    "LayerNormV4",
    what="gamma and beta have the normalised shape, and are of x's dtype or float32, both alike",
    source=f"{NN}: norm/layer_norm_v4/op_host/layer_norm_v4_def.cpp",
    remedy="cast and shape both when weights are written",
)
def layer_norm_affine(node: NodeView) -> Fault:
    x, given = node.dtype("x"), node.input("normalized_shape")
    pair = [each for each in (node.input("gamma"), node.input("beta")) if each]
    wrong = next((each for each in pair if each.dtype not in (None, x, "float32")), None)
    if wrong or len({each.dtype for each in pair}) > 1:
        return f"gamma and beta in {', '.join(str(each.dtype) for each in pair)} with x in {x}"
    normalised = given.values if given else None
    odd = next((each for each in pair if normalised and each.shape is not None and each.shape != normalised), None)
    return f"{list(odd.shape or ())} for the axes {list(normalised or ())}" if odd else None


@card_rule(
    "rope.tables",
    "RotaryMul",
    what="x has four axes, cos and sin have one shape that broadcasts to x's, with x's own last axis",
    source=_ROTARY,
    remedy="unsqueeze the tables to [B, T, 1, D]",
)
def rope_tables(node: NodeView) -> Fault:
    x, cos, sin = (node.shape(name) for name in ("x", "r1", "r2"))
    if x is None or cos is None or sin is None:
        return None
    fits = len(x) == len(cos) == 4 and cos == sin and cos[3] == x[3]
    if fits and all(table in (1, size) for table, size in zip(cos, x, strict=True)):
        return None
    return f"x {list(x)}, cos {list(cos)}, sin {list(sin)}"


@card_rule(
    "rope.width",
    "RotaryMul",
    what="the last axis is even and at most 896",
    source=_ROTARY,
    remedy="rotate halves by elementwise operators",
)
def rope_width(node: NodeView) -> Fault:
    x = node.shape("x")
    return f"a last axis of {x[-1]}" if x and (x[-1] % 2 or x[-1] > _WIDEST) else None


@card_rule(
    "rope.width_310p",
    "RotaryMul",
    what="the last axis is 128 on this chip",
    cards=("310P",),
    source=_ROTARY,
    remedy="run the graph op by op (--eager)",
)
def rope_width_310p(node: NodeView) -> Fault:
    x = node.shape("x")
    return f"a last axis of {x[-1]}" if x and x[-1] != 128 else None


@card_rule(
    "rope.applied",
    "ApplyRotaryPosEmb",
    what="query and key are [B, T, N, 128] in the layout BSND (1), cos and sin [B, T, 1, 128]",
    source=_APPLIED,
    remedy="use RotaryMul for other widths and layouts",
)
def rope_applied(node: NodeView) -> Fault:
    given = [node.shape(name) for name in ("query", "key", "cos", "sin")]
    known = [shape for shape in given if shape is not None]
    layout = node.attribute("layout", 1)
    if layout != 1:
        return f"layout {layout}"
    if any(len(shape) != 4 or shape[3] != 128 for shape in known):
        return f"shapes {', '.join(str(list(shape)) for shape in known)}"
    cos, sin = given[2:]
    wrong = len({shape[:2] for shape in known}) > 1 or cos != sin or (cos is not None and cos[2] != 1)
    return f"shapes {', '.join(str(list(shape)) for shape in known)}" if wrong else None
