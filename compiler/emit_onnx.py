"""Traced graph -> ONNX model whose weights lie in the artifact's shared weight files.

Each op of the vocabulary has one lowering here; so have the few aten ops that models use for reshaping and adding. An
op without a lowering is an error that names it. Lowerings emit the operators that onnxruntime's kernels want, so that
nothing is left for a graph optimiser to find and every bucket refers to the weights in the same form:

- linear: FusedMatMul with transB, which takes weights [N, C] as checkpoints store them; weights in 8 or 4 bits: MatMulNBits;
  weights in 16 bits, for which there are no kernels, are widened some rows at a time;
- linear_w8a8: MatMulIntegerToFloat, whose activations are uint8 around 128: kernels of processors with VNNI multiply unsigned
  by signed, and onnxruntime's others are slower by an order of magnitude. What several layers take is quantised once;
- cached_attention: com.microsoft.GroupQueryAttention, whose present outputs are bound to the memory of its past inputs.
  A padded chunk counts as whole: rows past the last real token are written and overwritten by the next step.
  int8_cached_attention is the same operator, which takes scales of channels as inputs and rounds as defined;
- rope: RotaryEmbedding with cos and sin as graph inputs, since their values depend on the request in some families.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.fx import Node

from ..model_defs.ops import NAMESPACE
from ..runtime.artifact import Collective, Kernels, Segment, Step, TensorSpec, WeightSpec
from .graphs import GraphDef, trace
from .segments import Part, cut

OPSET = 23
IR_VERSION = 10
CONTRIB = "com.microsoft"

_DTYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
NARROW = ("float16", "bfloat16")
# Matrices in 16 bits are widened by parts of so many bytes, which are still in the cache when they are multiplied: at once, one
# token takes one and a half times to twice as long, and more memory.
WIDENED_BYTES = 4 << 20

DEFAULT_KERNELS = Kernels()

# Squared and divided by the root of a head's width, it is far beyond any score, and its own products stay exact.
PADDING_FLAG = 1024.0
TOP_BLOCK = 128  # of a row of logits, when its largest are looked for
TO_UINT4 = helper.make_attribute("to", TensorProto.UINT4)
EXPANDS = "expands a weight"  # marks nodes of a twin that depend on weights alone


class UnsupportedOpError(NotImplementedError):
    """The traced graph holds an op without a lowering."""


class Emitter:
    """Collects the nodes and initializers of one ONNX graph while the traced nodes are lowered in order."""

    def __init__(
        self,
        weights: Mapping[str, WeightSpec],
        constants: Mapping[str, np.ndarray],
        kernels: Kernels = DEFAULT_KERNELS,
        *,
        exact: bool = False,
    ) -> None:
        self.weights, self.constants, self.kernels, self.exact = weights, constants, kernels, exact
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.narrow: dict[str, tuple[WeightSpec, tuple[int, ...]]] = {}  # weights in 16 bits and their shapes, by alias
        self.between: list[TensorSpec] = []  # further outputs: caches behind a piece of a chunk
        self.names: dict[Node, Any] = {}  # traced node -> ONNX value name, or a tuple of names
        self.memo: dict[tuple, Any] = {}
        self.scope = ""
        self.made = 0

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        domain: str = "",
        outputs: int = 1,
        names: Sequence[str] = (),
        **attributes: Any,
    ) -> Any:
        """Add one node; returns its output name, or a tuple of them. `names`: what the last outputs are called."""
        self.made += 1
        base = f"{self.scope}/{op}_{self.made}"
        results = (*(f"{base}:{i}" for i in range(outputs - len(names))), *names)
        self.nodes.append(helper.make_node(op, list(inputs), list(results), name=base, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The value under `key`, made at its first use: what every layer needs alike is computed once."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """A small inline constant; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype)
        values = "_".join(map(str, array.ravel().tolist()))
        if array.size > 16:
            values = hashlib.sha256(values.encode()).hexdigest()[:16]
        name = f"const_{dtype}_{'x'.join(map(str, array.shape))}_{values}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, shape: Sequence[int] | None = None, *, packed: bool = False) -> str:
        """A weight by its name in the artifact, perhaps in another shape of the same bytes; `packed`: as numbers of 4 bits.

        One in 16 bits is only there once `rows` or `widened` has been asked for it.
        """
        if name in self.constants:
            if name not in self.initializers:
                self.initializers[name] = numpy_helper.from_array(self.constants[name], name)
            return name
        spec = self.weights[name]
        shape = tuple(spec.shape if shape is None else shape)
        alias = name if shape == tuple(spec.shape) else f"{name}:{'x'.join(map(str, shape))}"
        if spec.dtype in NARROW:
            self.narrow[alias] = spec, shape
        elif alias not in self.initializers:
            self.initializers[alias] = _external(alias, shape, spec, TensorProto.UINT4 if packed else _DTYPES[spec.dtype])
        return alias

    def rows(self, alias: str, first: int = 0, end: int | None = None) -> str:
        """Rows of a weight in 16 bits, as they are stored."""
        spec, shape = self.narrow[alias]
        end = shape[0] if end is None else end
        name = alias if end - first == shape[0] else f"{alias}[{first}:{end}]"
        if name not in self.initializers:
            row = spec.nbytes // shape[0]
            part = msgspec.structs.replace(spec, offset=spec.offset + first * row, nbytes=(end - first) * row)
            self.initializers[name] = _external(name, (end - first, *shape[1:]), part, _DTYPES[spec.dtype])
        return name

    def widened(self, value: Any) -> Any:
        """A value that is computed with: a weight in 16 bits as float32, anything else as it is."""
        return self.node("Cast", [self.rows(value)], to=TensorProto.FLOAT) if value in self.narrow else value

    def __getitem__(self, node: Any) -> str:
        return self.names[node]


def _external(name: str, shape: tuple[int, ...], spec: WeightSpec, dtype: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)  # type: ignore[arg-type]
    for key, value in (("location", spec.file), ("offset", spec.offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}
WIDENING: set[str] = set()  # ops whose lowerings are given weights in 16 bits as they are


def lowers(*ops: str, widens: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a lowering: called with the emitter, the traced node and its arguments (values as ONNX names)."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(ops, function))
        WIDENING.update(ops if widens else ())
        return function

    return register


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


# ---- the vocabulary


@lowers("staticvl.linear", widens=True)
def _linear(e: Emitter, node: Node, x: str, weight: str, bias: str | None) -> str:
    y = _widened_product(e, x, weight) if weight in e.narrow else _product(e, x, weight)
    return y if bias is None else e.node("Add", [y, e.widened(bias)])


def _product(e: Emitter, x: str, weight: str) -> str:
    return e.node("FusedMatMul", [x, weight], domain=CONTRIB, transB=1)


def _widened_product(e: Emitter, x: str, weight: str) -> str:
    """x [..., C] times a weight [N, C] in 16 bits, some rows of it after the others."""
    n, c = e.narrow[weight][1]
    parts = math.ceil(4 * n * c / (e.kernels.widened_kib << 10 or WIDENED_BYTES))
    edges = [n * i // parts for i in range(parts + 1)]
    found = []
    for first, end in pairwise(dict.fromkeys(edges)):
        wide = e.node("Cast", [e.rows(weight, first, end)], to=TensorProto.FLOAT)
        found.append(_product(e, x, wide))
    return found[0] if len(found) == 1 else e.node("Concat", found, axis=-1)


@lowers("staticvl.linear_w8")
def _linear_w8(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str = "") -> str:
    return _grouped(e, node, x, qweight, scales, bias, zeros, bits=8)


@lowers("staticvl.linear_w4")
def _linear_w4(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str = "") -> str:
    return _grouped(e, node, x, qweight, scales, bias, zeros, bits=4)


def _grouped(e: Emitter, node: Node, x: str, qweight: str, scales: str, bias: str | None, zeros: str, *, bits: int) -> str:
    n, blocks, width = _shape(node.args[1])  # type: ignore[arg-type]
    block = width * 8 // bits
    k = _shape(node.args[0])[-1]  # type: ignore[arg-type]
    if e.exact:
        zeros = e[node.args[4]] if zeros else zeros  # by its name, as qweight: both may be read as numbers of 4 bits
        weight = _dequantised(e, e[node.args[1]], scales, zeros, (n, blocks, block), k, bits)
        y = _product(e, x, weight)
    else:
        # Level 4 rounds activations to 8 bits, block by block: the other levels are slower by two orders of magnitude.
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
        inputs = [x, qweight, scales, *([zeros] if zeros else [])]
        y = e.node("MatMulNBits", inputs, domain=CONTRIB, **attributes)
    return y if bias is None else e.node("Add", [y, bias])


def _dequantised(e: Emitter, qweight: str, scales: str, zeros: str, shape: tuple[int, int, int], k: int, bits: int) -> str:
    """The float weight [N, K], made anew in every run: four times faster than the exact level of MatMulNBits."""
    n, blocks, block = shape
    zeros = _zero_points(e, zeros, n, blocks, bits) if zeros else _middle(e, n, blocks, bits)
    inputs = [e.weight(qweight, (n, blocks * block), packed=bits == 4), scales, zeros]
    weight = e.node("DequantizeLinear", inputs, axis=1, block_size=block)
    return weight if blocks * block == k else _slice(e, weight, 1, 0, k)


def _middle(e: Emitter, n: int, blocks: int, bits: int) -> str:
    """[N, blocks] of 128, or of 8 as numbers of 4 bits."""
    zero = helper.make_tensor("zero_point", TensorProto.UINT8, [1], [1 << bits - 1])
    zeros = e.once(("zeros", n, blocks, bits), lambda: e.node("ConstantOfShape", [e.constant([n, blocks])], value=zero))
    if bits == 8:
        return zeros
    return e.once(("zeros of 4 bits", zeros), lambda: e.node("Cast", [zeros], to=TensorProto.UINT4))


def _zero_points(e: Emitter, zeros: str, n: int, blocks: int, bits: int) -> str:
    """Stored zero points -> [N, blocks]; of 4 bits there are two in a byte, and a row of odd length fills its last byte up."""
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
        # Not MatMul: onnxruntime would see a product to be quantised.
        y = e.node("FusedMatMul", [x, e.node("DequantizeLinear", [qweight, scales], axis=1)], domain=CONTRIB)
    else:
        q, row_scales = e.once(("rows", x), lambda: _quantised_rows(e, x, _shape(node.args[0])))  # type: ignore[arg-type]
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


@lowers("staticvl.rms_norm")
def _rms_norm(e: Emitter, node: Node, x: str, weight: str, eps: float) -> str:
    return e.node("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=eps)


@lowers("staticvl.layer_norm")
def _layer_norm(e: Emitter, node: Node, x: str, weight: str, bias: str, eps: float) -> str:
    return e.node("LayerNormalization", [x, weight, bias], axis=-1, epsilon=eps)


@lowers("staticvl.silu_mul")
def _silu_mul(e: Emitter, node: Node, gate: str, up: str) -> str:
    return e.node("Mul", [e.node("QuickGelu", [gate], domain=CONTRIB, alpha=1.0), up])


@lowers("staticvl.gelu")
def _gelu(e: Emitter, node: Node, x: str) -> str:
    return e.node("Gelu", [x])


@lowers("staticvl.quick_gelu")
def _quick_gelu(e: Emitter, node: Node, x: str) -> str:
    return e.node("QuickGelu", [x], domain=CONTRIB, alpha=1.702)


@lowers("staticvl.embed", widens=True)
def _embed(e: Emitter, node: Node, token_ids: str, table: str) -> str:
    if table not in e.narrow:
        return e.node("Gather", [table, token_ids], axis=0)
    return e.node("Cast", [e.node("Gather", [e.rows(table), token_ids], axis=0)], to=TensorProto.FLOAT)


@lowers("staticvl.merge_rows")
def _merge_rows(e: Emitter, node: Node, x: str, rows: str, index: str) -> str:
    zero = e.constant(0, "int32")
    taken = e.node("Gather", [rows, e.node("Max", [index, zero])], axis=0)
    is_text = e.node("Unsqueeze", [e.node("Less", [index, zero]), e.constant([-1])])
    return e.node("Where", [is_text, x, taken])


@lowers("staticvl.take_token")
def _take_token(e: Emitter, node: Node, x: str, index: str) -> str:
    b, t, c = _shape(node.args[0])  # type: ignore[arg-type]
    flat = e.node("Reshape", [x, e.constant([b * t, c])])
    if b > 1:
        index = e.node("Add", [index, e.constant(np.arange(b) * t, "int32")])
    return e.node("Gather", [flat, index], axis=0)


@lowers("staticvl.top_tokens")
def _top_tokens(e: Emitter, node: Node, logits: str, inverse_temperature: str, count: int) -> tuple[str, str, str]:
    """In two steps, so that no long row is sorted: the blocks with the largest maxima, then the largest of what is in them."""
    rows, vocab = _shape(node.args[0])  # type: ignore[arg-type]
    if vocab <= 2 * count * TOP_BLOCK:
        values, ids = e.node("TopK", [logits, e.constant([count])], outputs=2)
    else:
        values, ids = _of_blocks(e, logits, rows, vocab, count)
    largest = _slice(e, values, 1, 0, 1)
    factor = e.node("Reshape", [inverse_temperature, e.constant([-1, 1])])
    shares = e.node("Exp", [e.node("Mul", [e.node("Sub", [logits, largest]), factor])])
    return values, e.node("Cast", [ids], to=TensorProto.INT32), e.node("ReduceSum", [shares, e.constant([-1])], keepdims=0)


def _of_blocks(e: Emitter, logits: str, rows: int, vocab: int, count: int) -> tuple[str, str]:
    """The `count` largest of each row lie in the `count` blocks with the largest maxima, whichever of equals are taken."""
    blocks, missing, block = math.ceil(vocab / TOP_BLOCK), -vocab % TOP_BLOCK, e.constant(TOP_BLOCK)
    if missing:
        logits = e.node("Pad", [logits, e.constant([0, 0, 0, missing]), e.constant(-math.inf, "float32")])
    parts = e.node("Reshape", [logits, e.constant([rows * blocks, TOP_BLOCK])])
    maxima = e.node("Reshape", [e.node("ReduceMax", [parts, e.constant([-1])], keepdims=0), e.constant([rows, blocks])])
    _, chosen = e.node("TopK", [maxima, e.constant([count])], outputs=2, sorted=0)  # [R, count]
    place = e.node("Add", [chosen, e.constant(np.arange(rows)[:, None] * blocks)]) if rows > 1 else chosen
    found = e.node("Reshape", [e.node("Gather", [parts, place], axis=0), e.constant([rows, count * TOP_BLOCK])])
    values, place = e.node("TopK", [found, e.constant([count])], outputs=2)
    of = e.node("GatherElements", [chosen, e.node("Div", [place, block])], axis=1)
    return values, e.node("Add", [e.node("Mul", [of, block]), e.node("Mod", [place, block])])


@lowers("staticvl.rope")
def _rope(e: Emitter, node: Node, x: str, cos: str, sin: str) -> str:
    d = _shape(node.args[1])[-1]  # type: ignore[arg-type]
    heads = _shape(node)[-1] // d
    half = [e.once(("half", table), lambda table=table: _slice(e, table, -1, 0, d // 2)) for table in (cos, sin)]
    return e.node("RotaryEmbedding", [x, *half], num_heads=heads)


def _slice(e: Emitter, x: str, axis: int, start: int, end: int) -> str:
    return e.node("Slice", [x, e.constant([start]), e.constant([end]), e.constant([axis])])


@lowers("staticvl.cached_attention")
def _cached_attention(
    e: Emitter, node: Node, q: str, k: str, v: str, k_cache: str, v_cache: str, lengths: str, heads: int
) -> tuple[str, ...]:
    return _group_query_attention(e, node, [q, k, v], [k_cache, v_cache], lengths, heads)


@lowers("staticvl.int8_cached_attention")
def _int8_cached_attention(e: Emitter, node: Node, *values: Any) -> tuple[str, ...]:
    q, k, v, k_cache, v_cache, k_scale, v_scale, lengths, heads = values
    scales = ["", "", "", "", "", k_scale, v_scale]  # inputs between are left out
    quantised = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    return _group_query_attention(e, node, [q, k, v], [k_cache, v_cache], lengths, heads, scales, **quantised)


def _group_query_attention(
    e: Emitter,
    node: Node,
    rows: Sequence[str],
    caches: Sequence[str],
    lengths: str,
    heads: int,
    scales: Sequence[str] = (),
    **quantised: Any,
) -> tuple[str, ...]:
    """`rows` are q, k, v; `scales` what follows the usual inputs where caches are in 8 bits, and `quantised` how they are."""
    t, shape = _shape(node.args[0])[1], _shape(node.args[3])  # type: ignore[arg-type]
    dtype = str(node.args[3].meta["val"].dtype).removeprefix("torch.")  # type: ignore[union-attr]
    step = e.kernels.attention_tokens or t
    edges = [*range(0, t, step), t]
    pieces = [_pieces(e, x, edges) for x in rows]
    own, out = caches, []
    for i, end in enumerate(edges[1:]):
        # The operator wants the index of the last key of each row, and the largest number of keys of any row.
        last = e.once(("last", lengths, end), lambda end=end: _last_key(e, lengths, end))
        total = e.once(("total", last), lambda last=last: _most_keys(e, last))
        attributes = {"num_heads": heads, "kv_num_heads": shape[1], **quantised}
        # Caches between pieces are outputs too, so that they can be bound to the memory of the caches.
        names = [f"{name}.out@{i}" for name in own] if end < t else []
        e.between += [TensorSpec(name=name, dtype=dtype, shape=shape) for name in names]
        inputs = [*(x[i] for x in pieces), *caches, last, total, *scales]
        part, *caches = e.node("GroupQueryAttention", inputs, domain=CONTRIB, outputs=3, names=names, **attributes)
        out.append(part)
    return (out[0] if len(out) == 1 else e.node("Concat", out, axis=1)), *caches


def _pieces(e: Emitter, x: str, edges: Sequence[int]) -> Sequence[str]:
    """x [B, T, C] cut along T."""
    sizes = [end - start for start, end in pairwise(edges)]
    return e.node("Split", [x, e.constant(sizes)], outputs=len(sizes), axis=1) if len(sizes) > 1 else [x]


def _last_key(e: Emitter, lengths: str, tokens: int) -> str:
    return e.node("Add", [lengths, e.constant(tokens - 1, "int32")]) if tokens > 1 else lengths


def _most_keys(e: Emitter, last: str) -> str:
    return e.node("Add", [e.node("ReduceMax", [last], keepdims=0), e.constant(1, "int32")])


@lowers("staticvl.attention")
def _attention(e: Emitter, node: Node, q: str, k: str, v: str, heads: int) -> str:
    return e.node("MultiHeadAttention", [q, k, v], domain=CONTRIB, num_heads=heads)


@lowers("staticvl.padded_attention")
def _padded_attention(e: Emitter, node: Node, q: str, k: str, v: str, padding: str, heads: int) -> str:
    """One more element per head, c in queries and -c in keys that are padding, lowers the score of padding for padding by c^2
    and leaves every other score as it is. So the kernel needs no mask of tokens x tokens, and may work block by block."""
    b, t, c = _shape(node.args[0])  # type: ignore[arg-type]
    d = c // heads
    q, k = (_with_flag(e, x, padding, sign * PADDING_FLAG, (b, t, heads, d)) for x, sign in ((q, 1), (k, -1)))
    return e.node("MultiHeadAttention", [q, k, v], domain=CONTRIB, num_heads=heads, scale=d**-0.5)


def _with_flag(e: Emitter, x: str, padding: str, value: float, shape: tuple[int, ...]) -> str:
    b, t, heads, d = shape

    def flag() -> str:
        column = e.node("Mul", [e.node("Reshape", [padding, e.constant([b, t, 1, 1])]), e.constant(value, "float32")])
        return e.node("Expand", [column, e.constant([b, t, heads, 1])])

    parts = [e.node("Reshape", [x, e.constant(shape)]), e.once(("flag", padding, value), flag)]
    return e.node("Reshape", [e.node("Concat", parts, axis=-1), e.constant([b, t, heads * (d + 1)])])


@lowers("staticvl.cross_attention")
def _cross_attention(e: Emitter, node: Node, q: str, keys: Sequence[str], values: Sequence[str], mask: str, heads: int) -> str:
    """Picture by picture, so that their keys are read where they lie: only scores are joined, under one softmax."""
    b, t, c = _shape(node.args[0])  # type: ignore[arg-type]
    kv_heads, rows, d = _shape(node.args[1][0])[1:]  # type: ignore[arg-type, index]
    tiles = _shape(node.args[3])[-1] // len(keys)  # type: ignore[arg-type]
    group = heads // kv_heads
    queries = e.node("Reshape", [q, e.constant([b, t, kv_heads, group, d])])
    queries = e.node("Transpose", [queries], perm=[0, 2, 3, 1, 4])
    queries = e.node("Reshape", [queries, e.constant([b, kv_heads, group * t, d])])
    scores = []
    for j, key in enumerate(keys):
        score = e.node("FusedMatMul", [queries, key], domain=CONTRIB, transB=1, alpha=d**-0.5)
        score = e.node("Reshape", [score, e.constant([b, kv_heads, group, t, tiles, rows // tiles])])
        score = e.node("Add", [score, _tile_bias(e, mask, (b, t, tiles), j)])
        scores.append(e.node("Reshape", [score, e.constant([b, kv_heads, group * t, rows])]))
    weights = e.node("Softmax", [e.node("Concat", scores, axis=-1) if len(scores) > 1 else scores[0]], axis=-1)
    out = ""
    for j, value in enumerate(values):
        share = _slice(e, weights, -1, j * rows, (j + 1) * rows) if len(values) > 1 else weights
        part = e.node("MatMul", [share, value])
        out = e.node("Add", [out, part]) if out else part
    out = e.node("Reshape", [out, e.constant([b, kv_heads, group, t, d])])
    return e.node("Reshape", [e.node("Transpose", [out], perm=[0, 3, 1, 2, 4]), e.constant([b, t, c])])


def _tile_bias(e: Emitter, mask: str, shape: tuple[int, int, int], image: int) -> str:
    """What the mask adds to the scores of one picture: [B, 1, 1, T, tiles, 1]. Every layer needs it alike."""
    b, t, tiles = shape

    def make() -> str:
        part = _slice(e, mask, -1, image * tiles, (image + 1) * tiles)
        return e.node("Reshape", [part, e.constant([b, 1, 1, t, tiles, 1])])

    return e.once(("bias", mask, image), make)


@lowers("staticvl.mask_tiles")
def _mask_tiles(e: Emitter, node: Node, x: str, tile_count: str) -> str:
    shape = _shape(node)
    used = e.node("Less", [e.constant(np.arange(shape[0]), "int32"), tile_count])
    factor = e.node("Cast", [e.node("Reshape", [used, e.constant([shape[0], *[1] * (len(shape) - 1)])])], to=TensorProto.FLOAT)
    return e.node("Mul", [x, factor])


@lowers("staticvl.tile_padding")
def _tile_padding(e: Emitter, node: Node, tile_count: str, tiles: int, rows: int, padded_rows: int) -> str:
    unused = e.node("GreaterOrEqual", [e.constant(np.arange(tiles)[:, None], "int32"), tile_count])  # [tiles, 1]
    behind = e.constant((np.arange(padded_rows) >= rows)[None], "bool")
    padding = e.node("Cast", [e.node("Or", [unused, behind])], to=TensorProto.FLOAT)
    return e.node("Reshape", [padding, e.constant(_shape(node))])


@lowers("staticvl.pad_rows")
def _pad_rows(e: Emitter, node: Node, x: str, rows: int) -> str:
    return e.node("Pad", [x, e.constant([0, 0, 0, 0, rows - _shape(node.args[0])[1], 0])])  # type: ignore[arg-type]


# ---- aten


@lowers("aten.add.Tensor")
def _add(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.node("Add", [a, b])


@lowers("aten.mul.Tensor")
def _mul(e: Emitter, node: Node, a: str, b: str) -> str:
    return e.node("Mul", [a, b])


@lowers("aten.reshape.default", "aten.view.default", "aten.flatten.using_ints", "aten.unsqueeze.default")
def _reshape(e: Emitter, node: Node, x: str, *_: Any) -> str:
    return e.node("Reshape", [x, e.constant(_shape(node))])


@lowers("aten.expand.default")
def _expand(e: Emitter, node: Node, x: str, *_: Any) -> str:
    return e.node("Expand", [x, e.constant(_shape(node))])


@lowers("aten.permute.default")
def _permute(e: Emitter, node: Node, x: str, dims: Sequence[int]) -> str:
    return e.node("Transpose", [x], perm=list(dims))


@lowers("aten.cat.default")
def _cat(e: Emitter, node: Node, parts: Sequence[str], dim: int = 0) -> str:
    return e.node("Concat", list(parts), axis=dim)


@lowers("aten.slice.Tensor")
def _slice_tensor(e: Emitter, node: Node, x: str, dim: int = 0, start: int | None = None, end: int | None = None) -> str:
    whole = _shape(node.args[0])[dim]  # type: ignore[arg-type]
    start, end = start or 0, min(whole if end is None else end, whole)
    return x if (start, end) == (0, whole) else _slice(e, x, dim, start, end)


@lowers("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout")
def _to(e: Emitter, node: Node, x: str, *_: Any, **__: Any) -> str:
    return e.node("Cast", [x], to=_DTYPES[str(node.meta["val"].dtype).removeprefix("torch.")])


# ---- the whole graph


def emit(graph: GraphDef, weights: Mapping[str, WeightSpec], *, exact: bool = False) -> bytes:
    """Trace and lower one graph; returns the serialised ONNX model. Raises UnsupportedOpError naming an op without lowering.

    exact: the slow twin of a graph whose kernels round activations, for checking everything else about it.
    """
    program = trace(graph)
    steps = cut(graph, program).steps
    assert len(steps) == 1, f"{graph.name} is cut; see emit_steps"
    (part,) = steps
    assert isinstance(part, Part)
    return _emit_part(graph, program, part, graph.name, weights, exact=exact)


@dataclass(frozen=True, slots=True)
class EmittedSteps:
    """One rank's graph as GraphSpec has it in `steps` and `buffers`; `files` are those of the segments."""

    steps: tuple[Step, ...]
    buffers: tuple[TensorSpec, ...]
    files: dict[str, bytes]


def emit_steps(graph: GraphDef, weights: Mapping[str, WeightSpec], file: str, *, exact: bool = False) -> EmittedSteps:
    """As `emit`, one file FILE/000.onnx, FILE/001.onnx ... for each segment between collectives.

    `weights` may be those of any rank: segments name a weight file without its folder, so that they are the same for all.
    """
    program = trace(graph)
    plan = cut(graph, program)
    beside = {name: msgspec.structs.replace(spec, file=PurePath(spec.file).name) for name, spec in weights.items()}
    steps: list[Step] = []
    files: dict[str, bytes] = {}
    for step in plan.steps:
        if isinstance(step, Collective):
            steps.append(step)
            continue
        number = f"{len(files):03d}"
        segment = Segment(
            file=f"{file}/{number}.onnx",
            inputs=tuple(spec.name for spec in step.inputs),
            outputs=tuple(spec.name for spec in step.outputs),
        )
        files[segment.file] = _emit_part(graph, program, step, f"{graph.name}.{number}", beside, exact=exact)
        steps.append(segment)
    return EmittedSteps(tuple(steps), plan.buffers, files)


def _emit_part(
    graph: GraphDef,
    program: torch.export.ExportedProgram,
    part: Part,
    name: str,
    weights: Mapping[str, WeightSpec],
    *,
    exact: bool,
) -> bytes:
    emitter, outputs = _lowered(graph, program, part, weights, exact=exact)
    return _model(emitter, name, part, outputs).SerializeToString()


def _expands(e: Emitter, node: onnx.NodeProto) -> bool:
    """Whether a node belongs to expanding a weight."""
    if node.op_type == "Cast":
        return node.input[0] in e.initializers or node.attribute[:1] == [TO_UINT4] or node.doc_string == EXPANDS
    return node.op_type in ("ConstantOfShape", "DequantizeLinear") or node.doc_string == EXPANDS


def _lowered(
    graph: GraphDef, program: torch.export.ExportedProgram, part: Part, weights: Mapping[str, WeightSpec], *, exact: bool
) -> tuple[Emitter, list[str]]:
    """An emitter that holds the nodes of a part, and the names of what leaves it."""
    emitter = Emitter(weights, graph.constants, graph.kernels or DEFAULT_KERNELS, exact=exact)
    emitter.names |= _parameters(program) | part.entering
    for node in part.nodes:
        emitter.names[node] = _lower(emitter, node)
    # onnxruntime orders what depends on nothing by its place in this list, the first as late as it can: elsewhere, all weights
    # would be expanded before the first layer runs.
    emitter.nodes.sort(key=lambda node: not _expands(emitter, node))
    return emitter, _own_names(emitter, part)


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """One emitted file: the traced nodes whose values it holds, by the names of the values, and its ONNX nodes in order."""

    names: dict[Node, str]
    nodes: tuple[onnx.NodeProto, ...]
    outputs: dict[str, str]  # what leaves the file: name in `names` -> name in the file


def emitted_values(
    graph: GraphDef, program: torch.export.ExportedProgram, weights: Mapping[str, WeightSpec]
) -> tuple[Values, ...]:
    """Which value of which file is which value of the definition, for whoever looks into a graph while it runs."""
    found = []
    for part in cut(graph, program).parts:
        emitter, outputs = _lowered(graph, program, part, weights, exact=False)
        names = {node: emitter.names[node] for node in (*part.entering, *part.nodes)}
        left = dict(zip(outputs, (spec.name for spec in part.outputs), strict=True))
        found.append(Values({k: v for k, v in names.items() if isinstance(v, str)}, tuple(emitter.nodes), left))
    return tuple(found)


def _parameters(program: torch.export.ExportedProgram) -> dict[Node, str]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {node: names[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.name in names}


def _own_names(e: Emitter, part: Part) -> list[str]:
    """The values that leave a part; one that is also something else's, since its op does nothing, is copied."""
    taken = {*part.entering.values(), *e.initializers}
    names: list[str] = []
    for node in part.leaving:
        value = e[node]
        names.append(e.node("Identity", [value]) if value in taken else value)
        taken.add(names[-1])
    return names


def _lower(e: Emitter, node: Node) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        value, index = node.args
        return e.names[value][index]  # type: ignore[index]
    name = str(node.target).removesuffix(".default") if NAMESPACE in str(node.target) else str(node.target)
    stack = list((node.meta.get("nn_module_stack") or {"": ("graph", None)}).values())
    e.scope = stack[-1][0] or "graph"
    if name in ("aten.flatten.using_ints", "aten.view.default") and node.args[0] in e.names and e[node.args[0]] in e.weights:
        return e.weight(e[node.args[0]], _shape(node))  # a weight in another shape: same bytes, no node
    if name not in LOWERINGS:
        raise UnsupportedOpError(f"{name} (in {e.scope}) has no ONNX lowering; supported: {', '.join(sorted(LOWERINGS))}")

    def argument(value: Any) -> Any:
        if isinstance(value, Node):
            found = e.weight(e[value]) if _is_parameter(e, value) else e[value]
            return found if name in WIDENING else e.widened(found)
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        return value

    return LOWERINGS[name](e, node, *map(argument, node.args), **node.kwargs)


def _is_parameter(e: Emitter, node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and (e[node] in e.weights or e[node] in e.constants)


def _model(e: Emitter, name: str, part: Part, outputs: Sequence[str]) -> onnx.ModelProto:
    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], spec.shape)

    renames = dict(zip(outputs, (spec.name for spec in part.outputs), strict=True))
    for node in e.nodes:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = renames.get(value, value)
    proto = helper.make_graph(
        e.nodes,
        name,
        [*map(info, part.inputs)],
        [*map(info, (*part.outputs, *e.between))],
        [*e.initializers.values()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="staticvl")
