"""Passes that put fused operators into Ascend graphs: what they compute, where they apply, and the nodes of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from staticvl.compiler.ascend_graph.fusions import FUSIONS, VOCABULARY, swiglu_fits
from staticvl.compiler.ascend_graph.operators import aten, npu
from staticvl.compiler.ascend_graph.rewriting import Rewrite, TracedGraph
from staticvl.compiler.emit_ascend import decompositions, emit, make_kernel
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.plan import Buckets, Options, make_plan
from staticvl.model_defs import ops
from staticvl.model_defs.config import read_config
from staticvl.model_defs.layers import Linear
from staticvl.runtime.artifact import IN_FLOAT32, GraphKey, ImageProcessorConfig, TensorSpec
from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights.quantize import quantize_w8a8

from .conftest import EMBEDDED
from .ge_graphs import Lowered, lower
from .merged_models import graphs
from .need_torchair import skip_without_torchair
from .tiny_families import GOLDEN_QWEN

skip_without_torchair()

LLAVA, MLLAMA = EMBEDDED, EMBEDDED.with_name("tiny_mllama")
EXACT, ROUNDED = 1e-4, 2e-2
WIDTH, ROWS = 32, 3
# Without work of their own: they name the same memory otherwise. GE removes a Cast to the type that a value has.
FREE = {"Reshape", "Identity", "Unsqueeze", "Squeeze", "Const", "Data", "RefData", "NetOutput"}


# ---- one pattern at a time


class Pattern(nn.Module):
    """A few ops over parameters, or layers, and inputs: call(pattern, *inputs)."""

    def __init__(self, call: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part, requires_grad=False) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self, *inputs)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) * 11 + len(shape))).half().float()


def lowered(
    call: Callable[..., Any], parts: dict[str, Any], *inputs: Tensor, rewrites: tuple[Rewrite, ...] = FUSIONS
) -> Lowered:
    """A pattern after `rewrites` in float16, checked against its definition: wide, and with its roundings."""
    torchair_host.load()
    module = Pattern(call, parts)
    expected = module(*inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    specs = [TensorSpec(name=f"in{i}", dtype=str(x.dtype)[6:], shape=tuple(x.shape)) for i, x in enumerate(inputs)]
    outputs = [TensorSpec(name=f"out{i}", dtype="float32", shape=tuple(x.shape)) for i, x in enumerate(expected)]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    module.to("meta")
    key = GraphKey("decode", ROWS)
    kernel = make_kernel(GraphDef(key, module, tuple(specs), tuple(outputs)), torch.float16, rewrites)
    weights = [given(values, name, like) for name, like in zip(kernel.weights, kernel.arguments, strict=False)]
    method = getattr(kernel.module, kernel.name)
    graph = lower(
        method, *weights, *(x.half() if x.is_floating_point() else x for x in inputs), decompositions=decompositions()
    )
    for wide, allowed in ((True, EXACT), (False, ROUNDED)):
        for found, reference in zip(graph.run(wide=wide), expected, strict=True):
            assert found.shape == reference.shape
            assert float((found.float() - reference).abs().max() / reference.abs().max()) <= allowed, wide
    return graph


def given(values: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    return values[name.removesuffix(IN_FLOAT32)].to(like.dtype)


def nodes(graph: Lowered) -> dict[str, int]:
    """The types of operators that work, but for the products and what turns results into float32."""
    left_out = {*FREE, "MatMul", "Cast"}
    return {name: count for name, count in ge_graph.parse(graph.data).types().items() if name not in left_out}


NORM = {"gamma": (rand(WIDTH + 1)[:WIDTH] + 1).half().float(), "weight": rand(8, WIDTH)}


def normed(p: Any, x: Tensor) -> Tensor:
    return ops.linear(ops.rms_norm(x, p.gamma, 1e-5), p.weight, None)


X, Y = rand(ROWS, 2, WIDTH), rand(ROWS, WIDTH, 2).reshape(ROWS, 2, WIDTH) * 2
ADD_NORMS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, int]]] = {
    "a sum that goes on": (lambda p, x, y: ((s := x + y), normed(p, s)), (X, Y), {"AddRmsNorm": 1}),
    "a sum that only the norm reads": (lambda p, x, y: normed(p, x + y), (X, Y), {"AddRmsNorm": 1}),
    "rows of a sum": (lambda p, x, y: normed(p, (x + y).flatten(0, 1)), (X, Y), {"AddRmsNorm": 1}),
    "rows of a sum that goes on": (
        lambda p, x, y: ((s := x + y), normed(p, s.reshape(-1, WIDTH))),
        (X, Y),
        {"AddRmsNorm": 1},
    ),
    "one sum after another": (
        lambda p, x, y: normed(p, (s := x + y) + ops.rms_norm(s, p.gamma, 1e-5)),
        (X, Y),
        {"AddRmsNorm": 2},
    ),
    "heads of a sum": (
        lambda p, x, y: ops.rms_norm((x + y).unflatten(-1, (2, 16)), p.gamma[:16], 1e-5),
        (X, Y),
        {"Add": 1, "RmsNorm": 1, "StridedSliceV2": 1},
    ),
    "one row added to all": (lambda p, x, y: normed(p, x + y), (X, Y[:, :1].contiguous()), {"Add": 1, "RmsNorm": 1}),
    "a number added": (lambda p, x: normed(p, x + 0.5), (X,), {"Add": 1, "RmsNorm": 1}),
    "no sum": (normed, (X,), {"RmsNorm": 1}),
}


@pytest.mark.parametrize("name", ADD_NORMS)
def test_sums_that_are_normalised(name: str) -> None:
    call, inputs, expected = ADD_NORMS[name]
    assert nodes(lowered(call, NORM, *inputs)) == expected


def eights(count: int, columns: int = WIDTH, *, bias: bool = False) -> dict[str, Any]:
    """Layers q0, q1, .. with whole-number products. Not rounded: their kernels round in any case, but computed wide."""
    layers = {f"q{i}": Linear(columns, 12 + 4 * i, bias=bias, quant="w8a8") for i in range(count)}
    for layer in layers.values():
        layer.rounds = False
        values = [*quantize_w8a8(rand(layer.scales.shape[0], columns)), *([rand(layer.scales.shape[0])] if bias else [])]
        for name, value in zip(("qweight", "scales", "bias"), values, strict=False):
            getattr(layer, name).data = value
    return layers


GAMMA = NORM["gamma"]
SHARED: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[Tensor, ...], dict[str, int]]] = {
    "a norm": (
        lambda p, x: [(n := ops.rms_norm(x, p.gamma, 1e-5)), p.q0(n), p.q1(n)][1:],
        {"gamma": GAMMA, **eights(2)},
        (X,),
        {"RmsNorm": 1, "DynamicQuant": 1, "QuantBatchMatmulV3": 2},
    ),
    "a norm of a sum": (
        lambda p, x, y: [(s := x + y), (n := ops.rms_norm(s, p.gamma, 1e-5)), p.q0(n), p.q1(n), s][2:],
        {"gamma": GAMMA, **eights(2)},
        (X, Y),
        {"AddRmsNormDynamicQuant": 1, "QuantBatchMatmulV3": 2},
    ),
    "a norm of a sum, with biases": (
        lambda p, x, y: p.q0(ops.rms_norm(x + y, p.gamma, 1e-5)),
        {"gamma": GAMMA, **eights(1, bias=True)},
        (X, Y),
        {"AddRmsNormDynamicQuant": 1, "QuantBatchMatmulV3": 1},
    ),
    "a norm that others read": (
        lambda p, x, y: [(n := ops.rms_norm(x + y, p.gamma, 1e-5)), p.q0(n), n][1:],
        {"gamma": GAMMA, **eights(1)},
        (X, Y),
        {"AddRmsNorm": 1, "DynamicQuant": 1, "QuantBatchMatmulV3": 1},
    ),
    "no norm": (
        lambda p, x: (p.q0(x), p.q1(x)),
        eights(2),
        (X,),
        {"DynamicQuant": 1, "QuantBatchMatmulV3": 2},
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_are_quantised_once(name: str) -> None:
    call, parts, inputs, expected = SHARED[name]
    graph = lowered(lambda *given: made if isinstance(made := call(*given), Tensor) else tuple(made), parts, *inputs)
    assert nodes(graph) == expected
    parsed = ge_graph.parse(graph.data)
    for node in parsed.nodes:
        if node.type == "DynamicQuant" and name == "a norm":  # which CANN joins where nothing lies between
            assert node.inputs[0] and parsed.node(node.inputs[0].producer).type == "RmsNorm"


def join_halves(traced: TracedGraph) -> None:
    """silu_mul of both halves of one tensor becomes SwiGlu of the tensor, as merging does it."""
    for node in list(traced.graph.nodes):
        if node.target is VOCABULARY.silu_mul.default and node.args[0].target is aten.slice.Tensor:
            with traced.graph.inserting_before(node):
                joined = traced.graph.call_function(npu.npu_swiglu.default, (node.args[0].args[0], -1))
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)
            traced.graph.erase_node(node)


def mlp(p: Any, x: Tensor) -> Tensor:
    both = p.gate_up(ops.rms_norm(x, p.gamma, 1e-5))
    return p.down(ops.silu_mul(both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]))


def mlp_layers(half: int, *, bias: bool = False) -> dict[str, Any]:
    layers = {"gate_up": Linear(WIDTH, 2 * half, bias=bias, quant="w8a8"), "down": Linear(half, 8, bias=False, quant="w8a8")}
    for layer in layers.values():
        layer.rounds = False
        columns, rows = layer.qweight.shape
        layer.qweight.data, layer.scales.data = quantize_w8a8(rand(rows, columns))
        if layer.bias is not None:
            layer.bias.data = rand(rows)
    return {"gamma": GAMMA, **layers}


def test_swiglu_takes_whole_numbers_and_gives_rows() -> None:
    graph = lowered(mlp, mlp_layers(24), X, rewrites=(join_halves, *FUSIONS))
    assert nodes(graph) == {"RmsNorm": 1, "DynamicQuant": 1, "QuantBatchMatmulV3": 2, "DequantSwigluQuant": 1}


@pytest.mark.parametrize(
    ("layers", "reads"),
    [(mlp_layers(24, bias=True), mlp), (mlp_layers(24), lambda p, x: (mlp(p, x), p.gate_up(ops.rms_norm(x, p.gamma, 1e-5))))],
)
def test_swiglu_is_left_as_it_is(layers: dict[str, Any], reads: Callable[..., Any]) -> None:
    """A bias would have to be a whole number; a product that others read has to be in floats."""
    types = nodes(lowered(reads, layers, X, rewrites=(join_halves, *FUSIONS)))
    assert "DequantSwigluQuant" not in types or types["QuantBatchMatmulV3"] == 3


def test_swiglu_has_a_limit_of_width() -> None:
    """By the formula in the operator's documents: 4 n + 40 n bytes for n columns, and a little for rows."""
    assert swiglu_fits((1, 1, 4464)) and not swiglu_fits((1, 1, 4480))
    assert swiglu_fits((4000, 1, 4448)) and not swiglu_fits((8000, 1, 4448))
    types = nodes(lowered(mlp, mlp_layers(2240), X, rewrites=(join_halves, *FUSIONS)))
    assert types == {"RmsNorm": 1, "DynamicQuant": 2, "QuantBatchMatmulV3": 2, "SwiGlu": 1}


def attended(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Four query heads over two of keys; a last input scales the queries."""
    k_cache, v_cache, lengths, *factor = rest
    q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
    return ops.cached_attention(q * factor[0] if factor else q, k, v, k_cache, v_cache, lengths, 4)


def attention_inputs(d: int, tokens: int) -> tuple[Tensor, ...]:
    cos, sin = (
        torch.cat((half, half), -1) for half in (rand(2, tokens, d // 2), rand(tokens, 2, d // 2).reshape(2, tokens, -1))
    )
    q, k, v = rand(2, tokens, 4 * d), rand(2, tokens, 2 * d), rand(2, d, 2 * tokens).reshape(2, tokens, 2 * d)
    return q, k, v, cos, sin, rand(2, 2, 8, d), rand(2, 8, 2, d).reshape(2, 2, 8, d), torch.tensor([3, 0], dtype=torch.int32)


COPIES = 2  # of the caches, which are results here, and of queries and keys, which ApplyRotaryPosEmb writes over


@pytest.mark.parametrize("factor", [(), (rand(2, 1, 1),)], ids=["", "scaled"])
@pytest.mark.parametrize(
    ("d", "expected"),
    [(128, {"ApplyRotaryPosEmb": 1, "TensorMove": COPIES + 2}), (64, {"RotaryMul": 2, "TensorMove": COPIES})],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_queries_and_keys_are_turned_at_once(d: int, expected: dict[str, int], tokens: int, factor: tuple[Tensor, ...]) -> None:
    graph = lowered(lambda _, *inputs: attended(*inputs), {}, *attention_inputs(d, tokens), *factor)
    chunk = {"Transpose": 3, "Range": 1, "Less": 1}  # into the layout of caches; the mask
    rest = {"FusedInferAttentionScore": 1, "Scatter": 2, "Add": 1}
    assert nodes(graph) == expected | rest | ({"Mul": 1} if factor else {}) | (chunk if tokens > 1 else {})
    (attention,) = (node for node in ge_graph.parse(graph.data).nodes if node.type == "FusedInferAttentionScore")
    assert attention.attributes["input_layout"] == ("BNSD" if tokens == 1 else "BNSD_BSND")
    assert {node.attributes["axis"] for node in ge_graph.parse(graph.data).nodes if node.type == "Scatter"} == {-2}


def test_tables_that_differ_are_no_one_rotation() -> None:
    def call(_: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return ops.cached_attention(ops.rope(q, cos, sin), ops.rope(k, sin, cos), v, *rest, 4)

    assert nodes(lowered(call, {}, *attention_inputs(128, 1)))["RotaryMul"] == 2


def over_int8(p: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    scales = [scale.view(-1, 1, 32) for scale in (p.k_scale, p.v_scale)]
    k_cache, v_cache, lengths = rest
    return ops.int8_cached_attention(q, k, v, k_cache, v_cache, *scales, lengths, 4)


def test_rows_of_a_cache_in_8_bits_are_quantised_by_one_operator() -> None:
    caches = [
        torch.randint(-128, 128, (3, 2, 8, 32), generator=torch.Generator().manual_seed(i), dtype=torch.int8) for i in range(2)
    ]
    parts = {name: ((rand(64).abs() + 0.1) / 50).half().float() for name in ("k_scale", "v_scale")}
    inputs = (
        rand(3, 1, 128),
        rand(3, 1, 64),
        rand(3, 64, 1).reshape(3, 1, 64),
        *caches,
        torch.tensor([0, 5, 7], dtype=torch.int32),
    )
    graph = lowered(over_int8, parts, *inputs)
    assert nodes(graph) == {"Quantize": 2, "Scatter": 2, "TensorMove": COPIES, "FusedInferAttentionScore": 1, "Add": 1}
    parsed = ge_graph.parse(graph.data)
    given = {node.name for node in parsed.inputs}
    assert not [node for node in parsed.nodes if node.type == "Cast" and given & set(node.producers)], "of scales, for one"


# ---- the nodes of a layer


def definition(checkpoint: Path, name: str, quant: str = "none", *, int8: bool = False) -> GraphDef:
    config = read_config(checkpoint)
    if int8:
        config = replace(config, text=replace(config.text, int8_cache=True))
    buckets = Buckets(
        prefill=(8,), decode=(2,), verify=(4,), images=(1,) if config.text.cross_layers else None, context=64, slots=2
    )
    plan = make_plan(config, Options(checkpoint=checkpoint, out=Path(), buckets=buckets))
    cache = msgspec.structs.replace(plan.cache, text_dtype="int8" if int8 else msgspec.UNSET)
    image = ImageProcessorConfig(
        mode="stretch", size=config.vision.image_size, rows=config.vision.rows_per_tile, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    context = GraphContext(config=config, image=image, cache=cache, quant=quant)
    return define_graph(context, next(key for key in plan.graphs if key.name == name))


def kernels(graph: GraphDef, dtype: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Operators that work in a graph, and the names of its weights."""
    emitted = emit(graph, dtype)
    types = {name: count for name, count in ge_graph.parse(emitted.graph).types().items() if name not in FREE}
    return types, emitted.weights


# Of a decoder layer of the tiny models, whose heads are too narrow for ApplyRotaryPosEmb (which is one in place of two).
ATTENTION = {"RotaryMul": 2, "Scatter": 2, "FusedInferAttentionScore": 1}
MERGED, SINGLE = {"SplitV": 1}, {"ConcatV2": 1}
NORMS = {"AddRmsNorm": 2, "SwiGlu": 1}


def layer_of(quant: str, merged: bool) -> dict[str, int]:
    """What a decode layer is made of: with merged products at most 12 kernels (13 in w8a8) where heads are wide."""
    products = 4 if merged else 7
    rest = ATTENTION | (MERGED if merged else SINGLE)
    if quant == "w8a8":
        whole = {"DequantSwigluQuant": 1, "DynamicQuant": 1} if merged else {"SwiGlu": 1, "DynamicQuant": 2}
        return {"AddRmsNormDynamicQuant": 2, "QuantBatchMatmulV3": products} | whole | rest
    return NORMS | {"MatMul" if quant == "none" else "WeightQuantBatchMatmulV2": products} | rest


LAYERS = list(product((LLAVA, GOLDEN_QWEN), ("none", "w8a8", "w8a16", "w4a16-g32"), ("float16", "bfloat16")))
# Each quantisation once; both checkpoints, both dtypes, and Qwen-VL with the queries that it scales.
FEW = (
    (LLAVA, "none", "bfloat16"),
    (LLAVA, "w8a8", "float16"),
    (GOLDEN_QWEN, "w8a16", "bfloat16"),
    (GOLDEN_QWEN, "w4a16-g32", "float16"),
)


@pytest.mark.parametrize(
    ("checkpoint", "quant", "dtype"),
    [pytest.param(*each, marks=[] if each in FEW else [pytest.mark.slow]) for each in LAYERS],
    ids=[f"{'llava' if each[0] == LLAVA else 'qwen_vl'}-{each[1]}-{each[2]}" for each in LAYERS],
)
def test_nodes_of_a_decode_layer(checkpoint: Path, quant: str, dtype: str) -> None:
    graph = definition(checkpoint, "decode-2", quant)
    layers = sum("k_cache" in spec.name for spec in graph.outputs)
    types, weights = kernels(graph, dtype)
    merged = any(".qkv." in name for name in weights)
    layer = layer_of(quant, merged)
    assert sum(layer.values()) - 1 <= (13 if quant == "w8a8" else 12) or not merged, "the limit, with one rotation"
    # The first norm has no sum before it, and the last one is after the layers.
    quantised = {"DynamicQuant": 1, "AddRmsNorm": 1, "AddRmsNormDynamicQuant": -1} if quant == "w8a8" else {}
    outside = {"RmsNorm": 1, **quantised, "MatMul": int(quant == "none"), "WeightQuantBatchMatmulV2": int(quant != "none")}
    expected = {name: layers * layer.get(name, 0) + outside.get(name, 0) for name in {**layer, **outside}}
    found = {name: types.get(name, 0) for name in expected}
    assert found == expected
    scaled = layers if checkpoint == GOLDEN_QWEN else 0  # queries of Qwen-VL
    assert types.get("Mul", 0) == scaled
    # Inputs in the graph's type, lengths in 64 bits, logits in float32; torchair's after a Mul, which GE removes. Biases are
    # stored in the type that their product takes.
    assert types["Cast"] == 4 + (1 + scaled if scaled else 0)
    others = types.keys() - expected.keys() - {"Mul", "Cast", "GatherV2", "Transpose", "Add"}
    assert not others and types.get("Transpose", 0) <= 2 * types.get("WeightQuantBatchMatmulV2", 0), "of weights alone"
    assert types["Add"] == 1, "to lengths"


@pytest.mark.parametrize(
    "name", ["decode-2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("verify-4", "prefill-8"))]
)
def test_an_8_bit_cache_costs_two_nodes_a_layer(name: str) -> None:
    plain, eight = (kernels(definition(LLAVA, name, int8=int8), "bfloat16")[0] for int8 in (False, True))
    added = {each: eight.get(each, 0) - plain.get(each, 0) for each in {*eight, *plain}}
    assert {each: count for each, count in added.items() if count} == {"Quantize": 2 * 4}


@pytest.mark.parametrize(("name", "tokens"), [("verify-4", 4), ("prefill-8", 8)])
def test_nodes_of_chunks(name: str, tokens: int) -> None:
    """Whole tensors are transposed into the layout of attention alone: queries, new keys, new values."""
    types, _ = kernels(definition(LLAVA, name), "float16")
    layers = 4
    assert types["Transpose"] == 3 * layers
    assert types["AddRmsNorm"] == 2 * layers and types["RmsNorm"] == 1
    assert types["Add"] == 1


def test_nodes_of_layers_that_attend_to_images() -> None:
    """Their sums are of what gates have scaled."""
    graph = definition(MLLAMA, "decode-2-images-1")
    types, _ = kernels(graph, "float16")
    cross = len({spec.name.split(".")[1] for spec in graph.inputs if spec.name.startswith("cross_k.")})
    layers = cross + sum("k_cache" in spec.name for spec in graph.outputs)
    assert types["AddRmsNorm"] == 2 * layers
    assert types["RmsNorm"] == 1 + cross, "the first one, and those of queries"
    assert types["FusedInferAttentionScore"] == layers
    assert types["Mul"] == 5 * cross, "gates by weights, what they scale, and queries of tokens that see nothing"
    assert types["Add"] == 1


@pytest.mark.parametrize(
    ("ranks", "fused", "dtype"),
    [
        (1, False, "float16"),
        (2, False, "bfloat16"),
        (2, True, "float16"),
        pytest.param(1, False, "bfloat16", marks=pytest.mark.slow),
        pytest.param(2, False, "float16", marks=pytest.mark.slow),
        pytest.param(2, True, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_towers_in_whole_numbers(ranks: int, fused: bool, dtype: str) -> None:
    """Their pixels come in float32, and products of rows have results in 16 bits all the same."""
    (graph,) = (each for each in graphs("llava", "w8a8+vision", ranks=ranks, heads=16) if each.kind == "vision")
    parsed = ge_graph.parse(emit(graph, dtype, fused_all_reduce=fused).graph)
    products = [node for node in parsed.nodes if node.type in ("QuantBatchMatmulV3", "MatmulAllReduce")]
    assert len(products) >= 4 * 2, "queries with keys and values, o, up and down of two layers"
    assert {node.outputs[0].dtype for node in products} == {dtype}
