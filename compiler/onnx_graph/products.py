"""Lowerings of matrix products with weights in float32, 16, 8 and 4 bits."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

from onnx import NodeProto, TensorProto, helper
from torch.fx import Node

from .emitter import CONTRIB, Emitter, lowers, shape_of, slice_along

# Matrices in 16 bits are upcast in parts of so many bytes, which are still in the CPU's cache when they are multiplied.
# In one piece, a token takes one and a half times to twice as long, and more memory.
UPCAST_BYTES = 4 << 20
TO_UINT4 = helper.make_attribute("to", TensorProto.UINT4)
EXPANDS = "expands a weight"  # marks nodes of an exact reference graph that depend on weights alone


class Blocks(NamedTuple):
    """The sizes of a weight [N, K] that is stored in blocks of `block` numbers, the last of a row perhaps padded."""

    n: int
    k: int
    blocks: int  # in a row
    block: int
    bits: int  # of a number


@lowers("staticvl.linear", upcasts=True)
def _linear(e: Emitter, node: Node, x: str, weight: str, bias: str | None) -> str:
    y = _upcast_product(e, x, weight) if weight in e.narrow else _product(e, x, weight)
    return y if bias is None else e.node("Add", [y, e.upcast(bias)])


def _product(e: Emitter, x: str, weight: str) -> str:
    return e.node("FusedMatMul", [x, weight], domain=CONTRIB, transB=1)


def _upcast_product(e: Emitter, x: str, weight: str) -> str:
    """x [..., C] times a weight [N, C] in 16 bits, some rows at a time."""
    n, c = e.narrow[weight][1]
    parts = math.ceil(4 * n * c / (e.kernels.widened_kib << 10 or UPCAST_BYTES))
    edges = [n * i // parts for i in range(parts + 1)]
    products = []
    for first, end in pairwise(dict.fromkeys(edges)):
        wide = e.node("Cast", [e.rows(weight, first, end)], to=TensorProto.FLOAT)
        products.append(_product(e, x, wide))
    return products[0] if len(products) == 1 else e.node("Concat", products, axis=-1)


@lowers("staticvl.linear_w8")
def _linear_w8(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str = "") -> str:
    return _grouped(e, node, x, qweight, scales, bias, zeros, bits=8)


@lowers("staticvl.linear_w4")
def _linear_w4(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str = "") -> str:
    return _grouped(e, node, x, qweight, scales, bias, zeros, bits=4)


def _grouped(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str, *, bits: int) -> str:
    n, blocks, width = shape_of(node.args[1])  # type: ignore[arg-type]
    sizes = Blocks(n, shape_of(node.args[0])[-1], blocks, width * 8 // bits, bits)  # type: ignore[arg-type]
    if e.exact:
        zeros = e[node.args[4]] if zeros else zeros  # by its name, as qweight: both may be read as numbers of 4 bits
        y = _product(e, x, _dequantised(e, e[node.args[1]], scales, zeros, sizes))
    else:
        # Level 4 rounds activations to 8 bits, block by block: the other levels are slower by two orders of magnitude.
        attributes: dict[str, Any] = {"K": sizes.k, "N": n, "bits": bits, "block_size": sizes.block, "accuracy_level": 4}
        inputs = [x, qweight, scales, *([zeros] if zeros else [])]
        y = e.node("MatMulNBits", inputs, domain=CONTRIB, **attributes)
    return y if bias is None else e.node("Add", [y, bias])


def _dequantised(e: Emitter, qweight: str, scales: str, zeros: str, sizes: Blocks) -> str:
    """The float weight [N, K], computed in every run: four times faster than the exact level of MatMulNBits."""
    n, k, blocks, block, bits = sizes
    zeros = _zero_points(e, zeros, sizes) if zeros else _middle(e, sizes)
    inputs = [e.weight(qweight, (n, blocks * block), packed=bits == 4), scales, zeros]
    weight = e.node("DequantizeLinear", inputs, axis=1, block_size=block)
    return weight if blocks * block == k else slice_along(e, weight, 1, 0, k)


def _middle(e: Emitter, sizes: Blocks) -> str:
    """[N, blocks] of 128, or of 8 as numbers of 4 bits."""
    n, _, blocks, _, bits = sizes
    zero = helper.make_tensor("zero_point", TensorProto.UINT8, [1], [1 << bits - 1])
    zeros = e.once(("zeros", n, blocks, bits), lambda: e.node("ConstantOfShape", [e.constant([n, blocks])], value=zero))
    if bits == 8:
        return zeros
    return e.once(("zeros of 4 bits", zeros), lambda: e.node("Cast", [zeros], to=TensorProto.UINT4))


def _zero_points(e: Emitter, zeros: str, sizes: Blocks) -> str:
    """Stored zero points -> [N, blocks]; those of 4 bits are two in a byte, and the last byte of an odd row is padded."""
    n, _, blocks, _, bits = sizes
    if bits == 8:
        return zeros
    wide = e.weight(zeros, (n, blocks + blocks % 2), packed=True)
    if blocks % 2 == 0:
        return wide
    bounds = [e.constant([each]) for each in (0, blocks, 1)]
    wide = e.node("Cast", [wide], to=TensorProto.UINT8, doc_string=EXPANDS)  # no other operator takes 4 bits
    wide = e.node("Slice", [wide, *bounds], doc_string=EXPANDS)
    return e.node("Cast", [wide], to=TensorProto.UINT4)


@lowers("staticvl.linear_w8a8")
def _linear_w8a8(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, rounded: bool) -> str:
    if e.exact or not rounded:
        # Not MatMul, which onnxruntime would try to quantise.
        y = e.node("FusedMatMul", [x, e.node("DequantizeLinear", [qweight, scales], axis=1)], domain=CONTRIB)
    else:
        q, row_scales = e.once(("rows", x), lambda: _quantised_rows(e, x, shape_of(node.args[0])))  # type: ignore[arg-type]
        inputs = [q, qweight, e.constant(1, "float32"), scales, e.constant(128, "uint8")]
        y = e.node("Mul", [e.node("MatMulIntegerToFloat", inputs, domain=CONTRIB), row_scales])
    return y if bias is None else e.node("Add", [y, bias])


def _quantised_rows(e: Emitter, x: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """x [..., K] -> the same in uint8 around 128, and the scale of each row, [..., 1].

    A row of zeros has the scale 0, so whatever 0 / 0 is rounded to, its products are 0.
    """
    rows = math.prod(shape[:-1])
    axis = next((i for i, size in enumerate(shape[:-1]) if size == rows), None)
    largest = e.node("ReduceMax", [e.node("Abs", [x]), e.constant([-1])], keepdims=1)
    scales = e.node("Div", [largest, e.constant(127, "float32")])
    # The operator takes scales along one axis, which a batch of chunks would not have.
    flat = x if axis is not None else e.node("Reshape", [x, e.constant([rows, shape[-1]])])
    inputs = [flat, e.node("Reshape", [scales, e.constant([rows])]), e.constant([128] * rows, "uint8")]
    q = e.node("QuantizeLinear", inputs, axis=axis or 0)
    return (q if axis is not None else e.node("Reshape", [q, e.constant(shape)])), scales


def expands(e: Emitter, node: NodeProto) -> bool:
    """Whether a node belongs to expanding a weight."""
    if node.op_type == "Cast":
        return node.input[0] in e.initializers or node.attribute[:1] == [TO_UINT4] or node.doc_string == EXPANDS
    return node.op_type in ("ConstantOfShape", "DequantizeLinear") or node.doc_string == EXPANDS
