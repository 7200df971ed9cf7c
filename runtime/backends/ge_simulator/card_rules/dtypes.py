"""Operators and dtypes that the registry of the 910B has."""

from __future__ import annotations

from ..ge_graph import INPUT_TYPES
from . import registry
from .rules import ANY, Fault, card_rule
from .tensors import NodeView

_GE = "hicann/ge: tests/engines/nn_engine/depends/CANN_910b_stub/cann/opp/built-in"
_TORCHAIR = "Ascend/torchair: torchair/_ge_concrete_graph/auto_generated_ge_raw_ops.py"
# torchair writes axes, sizes and counts as int64; the graph engine narrows them (RefreshInt64ToInt32FusionPass).
_NARROWED = ("int64", "int32")


@card_rule(
    "any.operator",
    ANY,
    what="the chip's registry has no operator of this type",
    cards=("910B",),
    source=registry.SOURCE,
    remedy="lower it to operators that the registry has",
)
def operator(node: NodeView) -> Fault:
    kind = node.node.type
    return None if kind in registry.ELSEWHERE or kind in registry.operators() else f"{kind} is not registered"


@card_rule(
    "any.dtypes",
    ANY,
    what="the operator's registered combinations of dtypes do not hold this one",
    cards=("910B",),
    source=registry.SOURCE,
    remedy="cast the operand that differs before the operator",
)
def dtypes(node: NodeView) -> Fault:
    kind = node.node.type
    entry = registry.operators().get(registry.BECOMES.get(kind, kind))
    if entry is None or entry.by_code:
        return None
    fed = {}
    for name, source in node.fed:
        port = name if name in entry.inputs else name.rstrip("0123456789")
        tensor = node.graph.tensor(source)
        if port in entry.inputs and tensor.dtype is not None:
            narrowed = tensor.dtype == "int64" and node.graph.view(source.producer).node.type == "Const"
            fed[port] = _NARROWED if narrowed else tensor.dtype
    made = {port: dtype for i, port in enumerate(entry.outputs) if (dtype := _made(node, i))}
    if next(entry.combinations(fed, made), None) is not None or _removed(node):
        return None
    given = [f"{name} {dtype if isinstance(dtype, str) else dtype[0]}" for name, dtype in fed.items()]
    return f"{', '.join(given)} -> {', '.join(made.values())}"


def _removed(node: NodeView) -> bool:
    """A Cast to its own dtype, which the graph engine takes out."""
    return node.node.type == "Cast" and node.dtype("x") == node.dtype_attribute("dst_type")


def _made(node: NodeView, index: int) -> str | None:
    """The dtype of an output that torchair noted; one that it left open follows from the inputs."""
    outputs = node.node.outputs
    return outputs[index].dtype if index < len(outputs) and node.node.type not in INPUT_TYPES else None


_NO_COMPLEX = ("float32", "float16", "bfloat16", "int32", "int64")
_ARITHMETIC = {
    "Add": (*_NO_COMPLEX, "int8", "uint8"),
    "Mul": (*_NO_COMPLEX, "int8", "uint8", "int16"),
    "RealDiv": ("float32", "float16", "bfloat16", "int32"),
    "Reciprocal": ("float32", "float16", "bfloat16"),
    "BatchMatMul": ("float32", "float16", "bfloat16"),
    "BatchMatMulV2": ("float32", "float16", "bfloat16"),
    "MatMul": ("float32", "float16", "bfloat16"),
    "MatMulV2": ("float32", "float16", "bfloat16", "int8"),
}


@card_rule(
    "any.arithmetic",
    *_ARITHMETIC,
    what="the kernels of the operator, which chooses its types by code, do not take this dtype",
    cards=("910B",),
    source=f"{_GE}/op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info-legacy.json; {_TORCHAIR}",
    remedy="cast the operand before the operator",
)
def arithmetic(node: NodeView) -> Fault:
    source = next((source for _, source in node.fed), None)
    dtype = None if source is None else node.graph.tensor(source).dtype
    return f"{dtype}" if dtype and dtype not in _ARITHMETIC[node.node.type] else None


@card_rule(
    "slice.constants",
    "StridedSliceV2",
    what="begin, end, axes and strides have to be constants: the pass that gives the operator a kernel reads them",
    cards=("910B",),
    source=f"{_GE}/fusion_pass/config/fusion_config.json (ConstToAttrStridedSliceV2Fusion)",
    remedy="slice by fixed bounds, or gather",
)
def slice_constants(node: NodeView) -> Fault:
    for name in ("begin", "end", "axes", "strides"):
        producer = node.producer(name)
        if producer is not None and producer.node.type != "Const":
            return f"input {name} is made by {producer.node.type} {producer.node.name}"
    return None


@card_rule(
    "concat.axis",
    "ConcatV2",
    what="the axis has to be a constant: the kernel with the axis as an input takes float32 alone",
    cards=("910B",),
    source=registry.SOURCE,
    remedy="concatenate along a fixed axis",
)
def concat_axis(node: NodeView) -> Fault:
    producer = node.producer("concat_dim")
    return f"made by {producer.node.type}" if producer is not None and producer.node.type != "Const" else None


@card_rule(
    "topk.count",
    "TopKV2",
    what="k may not exceed the values of a row",
    source=_TORCHAIR,
    remedy="ask for fewer values",
)
def top_k_count(node: NodeView) -> Fault:
    shape, count = node.shape("x"), node.input("k")
    if shape is None or count is None or not count.values or not shape:
        return None
    return f"k = {count.values[0]} of {shape[-1]} values" if count.values[0] > shape[-1] else None
