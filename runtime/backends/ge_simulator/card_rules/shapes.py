"""Shapes of outputs from shapes of inputs: a small function for each kind of operator, None where values decide.

Sources: the operator definitions in torchair's auto_generated_ge_raw_ops.py and the public pages of the operators.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ..ge_graph import Node


class Known(Protocol):
    """A tensor as far as it is known."""

    @property
    def dtype(self) -> str | None: ...

    @property
    def shape(self) -> tuple[int, ...] | None: ...

    @property
    def values(self) -> tuple[Any, ...] | None: ...


Shape = tuple[int, ...]
Inputs = Mapping[str, Known]
Formula = Callable[[Node, Inputs], Sequence[Shape | None]]

_FORMULAS: dict[str, Formula] = {}


class _OpenShapeError(Exception):
    """A shape that is not known."""


def of(node: Node, inputs: Inputs) -> Sequence[Shape | None] | None:
    """Shapes of a node's outputs, None for one that is open; None where there is no formula or its inputs are not known."""
    formula = _FORMULAS.get(node.type)
    if formula is None:
        return None
    try:
        return formula(node, inputs)
    except (_OpenShapeError, KeyError, IndexError, ValueError, ZeroDivisionError):  # what does not fit is for the rules to say
        return None


def _formula(*types: str) -> Callable[[Formula], Formula]:
    def register(formula: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(types, formula))
        return formula

    return register


def _shape(inputs: Inputs, name: str) -> Shape:
    shape = inputs[name].shape
    if shape is None or min(shape, default=0) < 0:
        raise _OpenShapeError
    return shape


def _numbers(inputs: Inputs, name: str) -> list[int]:
    values = inputs[name].values
    if values is None:
        raise _OpenShapeError
    return [int(value) for value in values]


def _first(inputs: Inputs) -> Shape:
    return _shape(inputs, next(iter(inputs)))


def broadcast(*shapes: Shape) -> Shape:
    """The common shape by the usual rule; raises ValueError where there is none."""
    sizes = []
    for column in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        larger = {size for size in column if size != 1}
        if len(larger) > 1:
            raise ValueError(f"{shapes} do not broadcast")
        sizes.append(larger.pop() if larger else 1)
    return tuple(reversed(sizes))


@_formula(
    "Add", "Div", "Equal", "FloorDiv", "FloorMod", "Greater", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr",
    "Maximum", "Minimum", "Mul", "NotEqual", "Pow", "RealDiv", "SelectV2", "Sub", "TruncateDiv",
)  # fmt: skip
def _broadcast(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [broadcast(*(_shape(inputs, name) for name in inputs))]


@_formula(
    "Abs", "Adds", "Assign", "Cast", "Ceil", "ClipByValue", "ClipByValueV2", "Cos", "Erf", "Exp", "FastGelu", "Floor", "Gelu",
    "GeluV2", "HcomAllReduce", "Identity", "Log", "LogicalNot", "LogSoftmaxV2", "Muls", "Neg", "QuantUpdateScatter",
    "Reciprocal", "Relu", "RotaryMul", "Round", "Rsqrt", "Scatter", "ScatterElements", "ScatterUpdate", "Sigmoid", "Sign",
    "Sin", "SoftmaxV2", "Sqrt", "Square", "Swish", "Tanh", "TensorMove", "AscendQuantV2", "AscendQuant", "Quantize",
)  # fmt: skip
def _same(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [_first(inputs)]


@_formula("Reshape")
def _reshape(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    sizes = [shape[place] if size == 0 else size for place, size in enumerate(_numbers(inputs, "shape"))]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes = [math.prod(shape) // rest if size == -1 else size for size in sizes]
    return [tuple(sizes)]


@_formula("Transpose")
def _transpose(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [tuple(shape[axis] for axis in _numbers(inputs, "perm"))]


@_formula("Unsqueeze")
def _unsqueeze(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    axes, shape = node.attributes["axes"], list(_shape(inputs, "x"))
    rank = len(shape) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        shape.insert(axis, 1)
    return [tuple(shape)]


@_formula("Squeeze")
def _squeeze(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    axes = [axis % len(shape) for axis in node.attributes.get("axis", ())]
    return [tuple(size for i, size in enumerate(shape) if (i not in axes if axes else size != 1))]


@_formula("ConcatV2", "ConcatD")
def _concatenated(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    axis = node.attributes["concat_dim"] if "concat_dim" in node.attributes else _numbers(inputs, "concat_dim")[0]
    parts = [list(_shape(inputs, name)) for name in inputs if name != "concat_dim"]
    total = sum(part[axis] for part in parts)
    parts[0][axis] = total
    return [tuple(parts[0])]


@_formula("SplitV")
def _split(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape, sizes, axis = _shape(inputs, "x"), _numbers(inputs, "size_splits"), _numbers(inputs, "split_dim")[0]
    axis %= len(shape)
    rest = shape[axis] - sum(size for size in sizes if size >= 0)
    return [(*shape[:axis], rest if size < 0 else size, *shape[axis + 1 :]) for size in sizes]


@_formula("GatherV2", "Gather")
def _gather(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape, indices = _shape(inputs, "x"), _shape(inputs, "indices")
    axis = (_numbers(inputs, "axis")[0] if "axis" in inputs else 0) % len(shape)
    return [(*shape[:axis], *indices, *shape[axis + 1 :])]


@_formula("GatherElements")
def _gather_elements(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [_shape(inputs, "index")]


@_formula("BroadcastTo")
def _broadcast_to(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    sizes, shape = _numbers(inputs, "shape"), _shape(inputs, "x")
    own = (1,) * (len(sizes) - len(shape)) + shape
    return [tuple(old if size == -1 else size for size, old in zip(sizes, own, strict=True))]


@_formula("PadV3", "PadV2", "Pad")
def _pad(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    paddings = _numbers(inputs, "paddings")
    pairs = zip(paddings[::2], paddings[1::2], strict=True)
    return [tuple(size + before + after for size, (before, after) in zip(_shape(inputs, "x"), pairs, strict=True))]


@_formula("StridedSliceV2", "StridedSlice")
def _slice(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape, begins, ends = list(_shape(inputs, "x")), _numbers(inputs, "begin"), _numbers(inputs, "end")
    axes = _numbers(inputs, "axes") if "axes" in inputs else list(range(len(begins)))
    steps = _numbers(inputs, "strides") if "strides" in inputs else [1] * len(begins)
    if any(
        node.attributes.get(name) for name in ("begin_mask", "end_mask", "shrink_axis_mask", "ellipsis_mask", "new_axis_mask")
    ):
        return [None]
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        shape[axis] = len(range(*slice(begin, end, step).indices(shape[axis])))
    return [tuple(shape)]


@_formula("Range")
def _range(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    start, limit, delta = (_numbers(inputs, name)[0] for name in ("start", "limit", "delta"))
    return [(max(0, math.ceil((limit - start) / delta)),)]


@_formula("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceAll", "ReduceAny")
def _reduced(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    axes = {axis % len(shape) for axis in _numbers(inputs, "axes")}
    if node.attributes.get("keep_dims"):
        return [tuple(1 if i in axes else size for i, size in enumerate(shape))]
    return [tuple(size for i, size in enumerate(shape) if i not in axes)]


@_formula("ArgMaxWithValue")
def _largest(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape, axis = _shape(inputs, "x"), node.attributes["dimension"]
    axis %= len(shape)
    kept = (1,) if node.attributes.get("keep_dims") else ()
    return [(*shape[:axis], *kept, *shape[axis + 1 :])] * 2


@_formula("TopKV2")
def _top_k(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [(*_shape(inputs, "x")[:-1], _numbers(inputs, "k")[0])] * 2


@_formula("MatMul", "MatMulV2", "BatchMatMul", "BatchMatMulV2", "MatmulAllReduce", "QuantBatchMatmulV3")
def _product(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    flags = [next((node.attributes[n] for n in names if n in node.attributes), False) for names in _TRANSPOSED]
    left, right = (
        (*shape[:-2], shape[-1], shape[-2]) if flag else shape
        for shape, flag in zip((_shape(inputs, "x1"), _shape(inputs, "x2")), flags, strict=True)
    )
    return [(*broadcast(left[:-2], right[:-2]), left[-2], right[-1])]


_TRANSPOSED = (("transpose_x1", "adj_x1", "is_trans_a"), ("transpose_x2", "adj_x2", "is_trans_b"))


@_formula("WeightQuantBatchMatmulV2")
def _weight_quant_product(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    rows, columns = _shape(inputs, "x"), weight_columns(node, inputs)
    return [(rows[1] if node.attributes.get("transpose_x") else rows[0], columns)]


def weight_columns(node: Node, inputs: Inputs) -> int:
    """N of a WeightQuantBatchMatmulV2, whose int32 weight [K, N / 8], or transposed [N, K / 8], holds eight numbers of 4 bits;
    before a Transpose that the operator takes in, the packed axis is still that of K."""
    x, weight = _shape(inputs, "x"), _shape(inputs, "weight")
    depth = x[0] if node.attributes.get("transpose_x") else x[1]
    if node.attributes.get("transpose_weight"):
        return weight[0]
    return weight[1] * 8 if inputs["weight"].dtype == "int32" and weight[0] == depth else weight[1]


@_formula("DynamicQuant")
def _dynamic_quant(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [shape, shape[:-1]]


@_formula("SwiGlu")
def _swi_glu(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape, axis = list(_shape(inputs, "x")), node.attributes.get("dim", -1)
    shape[axis] //= 2
    return [tuple(shape)]


@_formula("DequantSwigluQuant")
def _dequant_swiglu(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [(*shape[:-1], shape[-1] // 2), shape[:-1]]


@_formula("RmsNorm")
def _rms_norm(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [shape, _statistics(shape, len(_shape(inputs, "gamma")))]


@_formula("AddRmsNorm")
def _add_rms_norm(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x1")
    return [shape, _statistics(shape, len(_shape(inputs, "gamma"))), shape]


@_formula("AddRmsNormDynamicQuant")
def _add_rms_norm_dynamic_quant(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x1")
    return [shape, None, shape, shape[:-1], None]


@_formula("LayerNormV4")
def _layer_norm(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [shape, *[_statistics(shape, len(_numbers(inputs, "normalized_shape")))] * 2]


def _statistics(shape: Shape, axes: int) -> Shape:
    return (*shape[: len(shape) - axes], *(1,) * axes)


@_formula("ApplyRotaryPosEmb")
def _apply_rotary(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [_shape(inputs, "query"), _shape(inputs, "key")]


@_formula("HcomAllGather")
def _all_gather(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    shape = _shape(inputs, "x")
    return [(shape[0] * node.attributes["rank_size"], *shape[1:])]


@_formula("ScatterPaKvCache")
def _scatter_pages(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    return [_shape(inputs, "key_cache"), _shape(inputs, "value_cache")]


@_formula("FusedInferAttentionScore")
def _attention(node: Node, inputs: Inputs) -> Sequence[Shape | None]:
    layout, _, out_layout = node.attributes.get("input_layout", "BSH").partition("_")
    query, value = _shape(inputs, "query"), _shape(inputs, "value0")
    paged = "block_table" in inputs  # of pages [Z, P, K * D] the last axis is of all heads, whose width is the query's
    if layout not in ("BNSD", "BSND", "BSH") or (len(value) != len(query) and not paged):
        return [None, None]
    shape = (*query[:-1], query[-1] if paged or layout == "BSH" else value[-1])
    if (layout, out_layout) == ("BNSD", "BSND"):
        shape = (shape[0], shape[2], shape[1], shape[3])
    return [None if out_layout not in ("", layout, "BSND") else shape, None]
