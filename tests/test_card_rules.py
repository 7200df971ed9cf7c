"""Rules of cards: each with a small graph that passes and a twin that breaks it; and who applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from staticvl.compiler.card_check import CardError, check_card
from staticvl.runtime.backends.ge_simulator import card_rules
from staticvl.runtime.backends.ge_simulator.card_rules import RULES, shapes
from staticvl.runtime.backends.ge_simulator.card_rules.pages import SCATTER
from staticvl.runtime.backends.ge_simulator.card_rules.tensors import GraphView
from staticvl.runtime.backends.ge_simulator.ge_graph import GeGraph, GeGraphError, Source, parse
from staticvl.runtime.backends.ge_simulator.simulator import Simulator

from .card_graphs import Graph, serialized
from .need_torchair import skip_without_torchair

H, B, F, I8, I32, I64 = "float16", "bfloat16", "float32", "int8", "int32", "int64"
Shape = tuple[int, ...]


# ---- one node of each kind


def one(kind: str, output: tuple[str, Shape], inputs: dict[str, tuple[str, Shape]], **attributes: Any) -> GeGraph:
    """A node whose operands are all graph inputs."""
    graph = Graph()
    fed = {name: graph.input(dtype, *shape) for name, (dtype, shape) in inputs.items()}
    graph.node(kind, fed, [output], **attributes)
    return graph.made()


def fia(
    q: Shape = (2, 8, 1, 128),
    kv: Shape = (2, 4, 1024, 128),
    *,
    heads: tuple[int, int] = (8, 4),
    dtypes: tuple[str, str] = (H, H),
    extra: dict[str, tuple[str, Shape]] | None = None,
    **attributes: Any,
) -> GeGraph:
    """Attention over lengths, as a decode step has it."""
    lengths = {"actual_seq_lengths_kv": (I64, (q[0],))}
    inputs = {"query": (dtypes[0], q), "key0": (dtypes[1], kv), "value0": (dtypes[1], kv), **lengths, **(extra or {})}
    settings = {"num_heads": heads[0], "num_key_value_heads": heads[1], "input_layout": "BNSD", "scale": 0.1, **attributes}
    return one("FusedInferAttentionScore", (dtypes[0], q), {name: each for name, each in inputs.items() if each}, **settings)


def masked(shape: Shape, *, queries: int = 1, keys: int = 256, dtype: str = "bool", **settings: Any) -> GeGraph:
    extra = {"atten_mask": (dtype, shape)}
    return fia((2, 8, queries, 128), (2, 4, keys, 128), extra=extra, **settings)


def int8_cache(scale: Shape, *, queries: int = 1, dtype: str = H, scale_dtype: str = "") -> GeGraph:
    both = (scale_dtype or dtype, scale)
    extra = {"key_antiquant_scale": both, "value_antiquant_scale": both}
    return fia((2, 8, queries, 128), dtypes=(dtype, I8), extra=extra)


def paged(
    queries: int = 1,
    *,
    heads: tuple[int, int] = (8, 4),
    width: int = 128,
    kv: Shape = (),
    dtype: str = H,
    size: int = 128,
    table: tuple[str, Shape] = (I32, (2, 8)),
    lengths: bool = True,
) -> GeGraph:
    """Attention over pages: one query in BNSD, several in BSND."""
    scale = {"key_antiquant_scale": (H, (1, heads[1], 1, width)), "value_antiquant_scale": (H, (1, heads[1], 1, width))}
    extra = {"block_table": table, **(scale if dtype == I8 else {})}
    if not lengths:
        extra["actual_seq_lengths_kv"] = ()  # type: ignore[assignment]
    q = (2, heads[0], 1, width) if queries == 1 else (2, queries, heads[0], width)
    layout, pages = "BNSD" if queries == 1 else "BSND", kv or (17, size, heads[1] * width)
    return fia(q, pages, heads=heads, dtypes=(H, dtype), extra=extra, block_size=size, input_layout=layout)


def scatter_pages(
    dtype: str = H, new: Shape = (6, 4, 128), slots: tuple[str, Shape] = (I32, (6,)), cache_mode: str = "Norm"
) -> GeGraph:
    cache, rows = (dtype, (17, 128, 4, 128)), (dtype, new)
    inputs = {"key": rows, "key_cache": cache, "slot_mapping": slots, "value": rows, "value_cache": cache}
    return one(SCATTER, cache, inputs, cache_mode=cache_mode, scatter_mode="None", strides=[1, 1], offsets=[0, 0])


def scatter(var: Shape, updates: Shape, indices: tuple[str, Shape] = (I32, (2,)), axis: int = 2) -> GeGraph:
    inputs = {"var": (H, var), "indices": indices, "updates": (H, updates)}
    return one("Scatter", (H, var), inputs, reduce="update", axis=axis)


def quant_scatter(width: int = 128, scales: tuple[str, Shape] = (F, (128,)), updates: str = H) -> GeGraph:
    var = (2, 4, 64, width)
    inputs = {"var": (I8, var), "indices": (I32, (2,)), "updates": (updates, (2, 4, 1, width)), "quant_scales": scales}
    return one("QuantUpdateScatter", (I8, var), inputs, reduce="update", axis=-2, quant_axis=-1)


def matmul(x: Shape = (4, 64), weight: Shape = (32, 64), dtypes: tuple[str, str] = (H, H), bias: str = "") -> GeGraph:
    inputs = {"x1": (dtypes[0], x), "x2": (dtypes[1], weight)} | ({"bias": (bias, (32,))} if bias else {})
    return one("MatMul", (dtypes[0], (4, 32)), inputs, transpose_x1=False, transpose_x2=True)


def w8(
    x: tuple[str, Shape] = (H, (4, 256)),
    weight: tuple[str, Shape] = (I8, (256, 64)),
    scale: Shape = (2, 64),
    group: int = 128,
    extra: dict[str, tuple[str, Shape]] | None = None,
) -> GeGraph:
    dtype, rows = x
    inputs = {"x": x, "weight": weight, "antiquant_scale": (dtype, scale), **(extra or {})}
    out = (dtype, (rows[0], weight[1][-1]))
    return one("WeightQuantBatchMatmulV2", out, inputs, antiquant_group_size=group, inner_precise=0)


def int8_product(scale: tuple[str, Shape] = (F, (64,)), out: str = H, bias: str = "", rows: Shape = (4,)) -> GeGraph:
    inputs = {"x1": (I8, (4, 256)), "x2": (I8, (256, 64)), "scale": scale, "pertoken_scale": (F, rows)}
    return one("QuantBatchMatmulV3", (out, (4, 64)), inputs | ({"bias": (bias, (64,))} if bias else {}), dtype=1)


def norm(gamma: tuple[str, Shape] = (H, (64,)), x: tuple[str, Shape] = (H, (4, 64))) -> GeGraph:
    return one("RmsNorm", x, {"x": x, "gamma": gamma}, epsilon=1e-5)


def add_norm(second: tuple[str, Shape] = (H, (4, 64)), gamma: str = H) -> GeGraph:
    return one("AddRmsNorm", (H, (4, 64)), {"x1": (H, (4, 64)), "x2": second, "gamma": (gamma, (64,))})


def layer_norm(beta: tuple[str, Shape] = (H, (64,))) -> GeGraph:
    graph = Graph()
    x, gamma, shift = graph.input(H, 4, 64), graph.input(H, 64), graph.input(beta[0], *beta[1])
    inputs = {"x": x, "normalized_shape": graph.const(64), "gamma": gamma, "beta": shift}
    graph.node("LayerNormV4", inputs, [(H, (4, 64))])
    return graph.made()


def rotary(x: Shape = (1, 4, 8, 128), cos: Shape = (1, 4, 1, 128), sin: Shape | None = None) -> GeGraph:
    return one("RotaryMul", (H, x), {"x": (H, x), "r1": (H, cos), "r2": (H, sin or cos)})


def applied(q: Shape = (1, 4, 8, 128), cos: Shape = (1, 4, 1, 128), **attributes: Any) -> GeGraph:
    inputs = {"query": (H, q), "key": (H, (*q[:2], 2, q[3])), "cos": (H, cos), "sin": (H, cos)}
    return one("ApplyRotaryPosEmb", (H, q), inputs, **attributes)


def unary(kind: str, dtype: str, shape: Shape = (4, 64), **attributes: Any) -> GeGraph:
    return one(kind, (dtype, shape), {"x": (dtype, shape)}, **attributes)


def reduced(group: str = "tag=;rank_list=0,1,2,3", x: tuple[str, Shape] = (H, (4, 64)), weight: Shape = (64, 32)) -> GeGraph:
    inputs = {"x1": x, "x2": (x[0], weight)}
    return one("MatmulAllReduce", (x[0], (4, 32)), inputs, group=group, is_trans_a=False, is_trans_b=False)


def added(dtype: str) -> GeGraph:
    return one("Add", (dtype, (4,)), {"x1": (dtype, (4,)), "x2": (dtype, (4,))})


def sliced(*, constant: bool) -> GeGraph:
    graph = Graph()
    x = graph.input(H, 8, 4)
    begin, end = (graph.const(0), graph.const(4)) if constant else (graph.input(I64, 1), graph.input(I64, 1))
    bounds = {"begin": begin, "end": end, "axes": graph.const(0), "strides": graph.const(1)}
    graph.node("StridedSliceV2", {"x": x, **bounds}, [(H, (4, 4))])
    return graph.made()


def joined(*, constant: bool) -> GeGraph:
    graph = Graph()
    parts = {f"x{i}": graph.input(H, 4, 4) for i in range(2)}
    graph.node("ConcatV2", {**parts, "concat_dim": graph.const(0) if constant else graph.input(I32, 1)}, [(H, (8, 4))], N=2)
    return graph.made()


def top_k(count: int) -> GeGraph:
    graph = Graph()
    graph.node("TopKV2", {"x": graph.input(F, 2, 64), "k": graph.const(count)}, [(F, (2, count)), (I32, (2, count))])
    return graph.made()


# ---- several nodes


def transposed(order: tuple[int, ...], shape: Shape = (4, 8, 16)) -> GeGraph:
    graph = Graph()
    x = graph.input(H, *shape)
    graph.node("Transpose", {"x": x, "perm": graph.const(*order)}, [(H, tuple(shape[axis] for axis in order))])
    return graph.made()


def prepared(*, cut: bool) -> GeGraph:
    """A product with 128 rows of a weight of 256, or with all of them."""
    graph = Graph()
    x, weight = graph.input(H, 4, 64), graph.input(H, 256, 64)
    if cut:
        bounds = {"begin": graph.const(0), "end": graph.const(128), "axes": graph.const(0), "strides": graph.const(1)}
        weight = graph.node("StridedSliceV2", {"x": weight, **bounds}, [(H, (128, 64))])
    graph.node("MatMul", {"x1": x, "x2": weight}, [(H, (4, 128 if cut else 256))], transpose_x2=True)
    return graph.made()


def of_weights(*, alone: bool) -> GeGraph:
    """Scales of a cache that are inverted in every step, or values that a step brings."""
    graph = Graph()
    scale = graph.input(H, 1, 4, 1, 128)
    value = scale if alone else graph.input(H, 1, 4, 1, 128)
    inverse = graph.node("Reciprocal", {"x": value}, [(H, (1, 4, 1, 128))])
    cache = {name: graph.input(I8, 2, 4, 1024, 128) for name in ("key0", "value0")}
    scales = dict.fromkeys(("key_antiquant_scale", "value_antiquant_scale"), scale)
    lengths = graph.input(I64, 2)
    inputs = {"query": graph.input(H, 2, 8, 1, 128), **cache, **scales, "actual_seq_lengths_kv": lengths}
    settings = {"num_heads": 8, "num_key_value_heads": 4, "input_layout": "BNSD"}
    attention = graph.node("FusedInferAttentionScore", inputs, [(H, (2, 8, 1, 128))], **settings)
    return graph.made(attention, inverse)


def over_images(count: int) -> GeGraph:
    graph = Graph()
    keys = [graph.input(H, 1, 4, 256, 128) for _ in range(count)]
    key = keys[0]
    if count > 1:
        parts = {f"x{i}": each for i, each in enumerate(keys)}
        key = graph.node("ConcatV2", {**parts, "concat_dim": graph.const(2)}, [(H, (1, 4, 256 * count, 128))], N=count)
    inputs: dict[str, Source | None] = {"query": graph.input(H, 1, 8, 4, 128), "key0": key, "value0": key}
    settings = {"num_heads": 8, "num_key_value_heads": 4, "input_layout": "BNSD"}
    graph.node("FusedInferAttentionScore", inputs, [(H, (1, 8, 4, 128))], **settings)
    return graph.made()


def quantised_norm(*, reshaped: bool) -> GeGraph:
    graph = Graph()
    y = graph.node("RmsNorm", {"x": graph.input(H, 2, 1, 64), "gamma": graph.input(H, 64)}, [(H, (2, 1, 64))])
    if reshaped:
        y = graph.node("Reshape", {"x": y, "shape": graph.const(2, 64)}, [(H, (2, 64))])
    graph.node("DynamicQuant", {"x": y}, [(I8, (2, 64)), (F, (2,))])
    return graph.made()


def summed(*, of_product: bool) -> GeGraph:
    graph = Graph()
    x = graph.input(H, 4, 64)
    if of_product:
        x = graph.node("MatMul", {"x1": x, "x2": graph.input(H, 32, 64)}, [(H, (4, 32))], transpose_x2=True)
    graph.node("HcomAllReduce", {"x": x}, [(H, (4, 32))], reduction="sum", group="tag=;rank_list=0,1")
    return graph.made()


def filled_up(*, of_product: bool) -> GeGraph:
    graph = Graph()
    x = graph.input(H, 64, 104)
    if of_product:
        x = graph.node("MatMul", {"x1": x, "x2": graph.input(H, 104, 104)}, [(H, (64, 104))], transpose_x2=True)
    graph.node("PadV3", {"x": x, "paddings": graph.const(0, 0, 0, 8)}, [(H, (64, 112))])
    return graph.made()


def shifted(heads: int) -> GeGraph:
    return fia(extra={"pse_shift": (H, (2, heads, 1, 1024))})


def packed(*, mask: bool) -> GeGraph:
    shapes_ = {"query": (H, (64, 8, 128)), "key0": (H, (64, 8, 128)), "value0": (H, (64, 8, 128))}
    inputs = shapes_ | ({"atten_mask": ("bool", (2048, 2048))} if mask else {})
    return one("FusedInferAttentionScore", (H, (64, 8, 128)), inputs, num_heads=8, input_layout="TND", sparse_mode=3 * mask)


# ---- the table


@dataclass(frozen=True)
class Case:
    """A graph that passes a rule, and one that breaks it."""

    rule: str
    passes: Callable[[], GeGraph]
    breaks: Callable[[], GeGraph]


def case(rule: str, passes: Callable[[], GeGraph], breaks: Callable[[], GeGraph]) -> Any:
    return pytest.param(Case(rule, passes, breaks), id=rule)


CACHE, ROW = (2, 4, 64, 128), (2, 4, 1, 128)
CASES = [
    case("any.operator", lambda: unary("Exp", H), lambda: unary("Frobnicate", H)),
    case("any.dtypes", lambda: unary("SwiGlu", H, dim=-1), lambda: unary("SwiGlu", I32, dim=-1)),
    case("any.dtypes", lambda: unary("Cast", I32, dst_type=3), lambda: unary("Exp", I32)),
    case("any.arithmetic", lambda: added(I32), lambda: added("bool")),
    case("slice.constants", lambda: sliced(constant=True), lambda: sliced(constant=False)),
    case("concat.axis", lambda: joined(constant=True), lambda: joined(constant=False)),
    case("topk.count", lambda: top_k(64), lambda: top_k(65)),
    case("fia.card", lambda: added(H), fia),
    case("fia.heads", fia, lambda: fia((2, 6, 1, 128), heads=(6, 4))),
    case("fia.heads", lambda: fia((2, 64, 1, 128), (2, 1, 64, 128), heads=(64, 1)), lambda: fia(heads=(65, 1))),
    case("fia.width", lambda: fia((2, 8, 1, 112), (2, 4, 64, 112)), lambda: fia((2, 8, 1, 104), (2, 4, 64, 104))),
    case("fia.rows", fia, lambda: fia((65537, 8, 1, 128), (65537, 4, 64, 128))),
    case(
        "fia.features",
        lambda: fia((1, 4, 65520), (1, 4, 65520), heads=(195, 195), input_layout="BSH"),
        lambda: fia((1, 4, 65536), (1, 4, 65536), heads=(256, 256), input_layout="BSH"),
    ),
    case("fia.mask_dtype", lambda: masked((2, 1, 1, 256)), lambda: masked((2, 1, 1, 256), dtype=H)),
    case("fia.mask_rows", lambda: masked((1, 1, 4, 256), queries=4), lambda: masked((1, 1, 4, 255), queries=4)),
    case("fia.mask_rows", lambda: masked((2, 4, 256), queries=4), lambda: masked((3, 1, 4, 256), queries=4)),
    case("fia.mask_one_query", lambda: masked((2, 1, 1, 256)), lambda: masked((1, 1, 1, 256))),
    case("fia.mask_one_query", lambda: masked((2, 256)), lambda: masked((2, 1, 1, 255))),
    case(
        "fia.compressed_mask",
        lambda: masked((2048, 2048), queries=4, sparse_mode=3),
        lambda: masked((4, 256), queries=4, sparse_mode=3),
    ),
    case("fia.compressed_mask", fia, lambda: fia(sparse_mode=3)),
    case("fia.int8_one_query", lambda: int8_cache((1, 4, 1, 128)), lambda: int8_cache((4, 1, 128))),
    case("fia.int8_one_query", lambda: int8_cache((1, 4, 128)), lambda: int8_cache((1, 4, 1, 128), scale_dtype=F)),
    case(
        "fia.int8_queries",
        lambda: int8_cache((4, 1, 128), queries=16, dtype=B),
        lambda: int8_cache((4, 1, 128), queries=17, dtype=B),
    ),
    case("fia.int8_queries", lambda: int8_cache((4, 128), queries=2, dtype=B), lambda: int8_cache((4, 128), queries=2)),
    case("fia.lengths", fia, lambda: fia(extra={"actual_seq_lengths_kv": (I32, (2,))})),
    case("fia.lengths", fia, lambda: fia(extra={"actual_seq_lengths_kv": (I64, (3,))})),
    case("fia.pages", paged, lambda: paged(size=120)),
    case("fia.pages", lambda: paged(size=512), lambda: paged(size=528)),
    case("fia.pages", lambda: paged(dtype=I8, size=32), lambda: paged(dtype=I8, size=16)),
    case("fia.pages", lambda: paged(4), lambda: paged(4, size=64)),
    case("fia.page_table", paged, lambda: paged(table=(I32, (1, 8)))),
    case("fia.page_table", paged, lambda: paged(table=(I64, (2, 8)))),
    case("fia.page_lengths", paged, lambda: paged(lengths=False)),
    case("fia.page_keys", lambda: paged(table=(I32, (2, 2048))), lambda: paged(table=(I32, (2, 2049)))),
    case("fia.page_layout", lambda: paged(kv=(17, 4, 128, 128)), lambda: paged(4, kv=(17, 4, 128, 128))),
    case("fia.page_layout", paged, lambda: paged(kv=(17, 128, 256))),
    case(
        "fia.page_layout",
        lambda: paged(heads=(128, 128), width=496, kv=(17, 128, 63488)),
        lambda: paged(heads=(128, 128), width=512, kv=(17, 128, 65536)),
    ),
    case("fia.page_int8", lambda: paged(dtype=I8), lambda: paged(2, dtype=I8)),
    case("fia.heads", lambda: paged(heads=(64, 1), kv=(17, 128, 128)), lambda: paged(heads=(65, 1), kv=(17, 128, 128))),
    case("scatter_pages.card", lambda: added(H), scatter_pages),
    case("scatter_pages.layout", scatter_pages, lambda: scatter_pages(cache_mode="PA_NZ")),
    case("scatter_pages.sizes", scatter_pages, lambda: scatter_pages(new=(6, 4, 64))),
    case("scatter_pages.sizes", lambda: scatter_pages(I8), lambda: scatter_pages(new=(2, 3, 4, 128))),
    case("scatter_pages.slots", lambda: scatter_pages(slots=(I64, (6,))), lambda: scatter_pages(slots=(I32, (5,)))),
    case("scatter_pages.slots", scatter_pages, lambda: scatter_pages(slots=(F, (6,)))),
    case("scatter.card", lambda: added(H), lambda: scatter(CACHE, ROW)),
    case("scatter.axis", lambda: scatter(CACHE, ROW), lambda: scatter(CACHE, (1, 4, 64, 128), axis=0)),
    case("scatter.rank", lambda: scatter(CACHE, ROW), lambda: scatter(CACHE, (2, 4, 128))),
    case("scatter.indices", lambda: scatter(CACHE, ROW), lambda: scatter(CACHE, ROW, (H, (2,)))),
    case("scatter.indices", lambda: scatter(CACHE, ROW, (I64, (2,))), lambda: scatter(CACHE, ROW, (I32, (3,)))),
    case("scatter.updates", lambda: scatter(CACHE, ROW), lambda: scatter(CACHE, (2, 3, 1, 128))),
    case("scatter.alignment", quant_scatter, lambda: quant_scatter(112, (F, (112,)))),
    case("scatter.alignment", lambda: quant_scatter(scales=(B, (128,)), updates=B), lambda: quant_scatter(scales=(B, (128,)))),
    case("hccl.dtype", lambda: unary("HcomAllReduce", F), lambda: unary("HcomAllReduce", "bool")),
    case("hccl.bfloat16", lambda: unary("HcomAllReduce", H), lambda: unary("HcomAllReduce", B)),
    case("hccl.ranks", reduced, lambda: reduced("tag=;rank_list=0,1,2")),
    case("norm.gamma", norm, lambda: norm((B, (64,)))),
    case("norm.gamma", lambda: norm((F, (64,))), lambda: norm((H, (32,)))),
    case("norm.sum", add_norm, lambda: add_norm((H, (4, 1, 64)))),
    case("norm.sum", add_norm, lambda: add_norm(gamma=F)),
    case("norm.row", norm, lambda: norm(x=(H, (4, 8)), gamma=(H, (8,)))),
    case("layernorm.affine", layer_norm, lambda: layer_norm((F, (64,)))),
    case("layernorm.affine", layer_norm, lambda: layer_norm((H, (32,)))),
    case("rope.tables", rotary, lambda: rotary(cos=(1, 1, 4, 128))),
    case("rope.tables", rotary, lambda: rotary(sin=(1, 1, 1, 128))),
    case("rope.width", rotary, lambda: rotary((1, 4, 8, 898), (1, 4, 1, 898))),
    case("rope.width_310p", rotary, lambda: rotary((1, 4, 8, 64), (1, 4, 1, 64))),
    case("rope.applied", applied, lambda: applied((1, 4, 8, 64), (1, 4, 1, 64))),
    case("rope.applied", lambda: applied(layout=1), lambda: applied(layout=3)),
    case("matmul.sizes", matmul, lambda: matmul((4, 65))),
    case("matmul.sizes", matmul, lambda: matmul((1, 4, 64))),
    case("matmul.operands", lambda: matmul(bias=F), lambda: matmul(bias=B)),
    case("matmul.operands", lambda: matmul(dtypes=(B, B), bias=B), lambda: matmul(dtypes=(H, B))),
    case("matmul.layout", lambda: matmul(dtypes=(F, F)), matmul),
    case("w8.card", lambda: added(H), w8),
    case("w8.rows", w8, lambda: w8((H, (1, 4, 256)))),
    case("w8.features", lambda: w8(weight=(I8, (256, 65535)), scale=(2, 65535)), lambda: w8(weight=(I8, (256, 65536)))),
    case("w8.group", w8, lambda: w8(group=48, scale=(6, 64))),
    case("w8.group", lambda: w8(group=0, scale=(1, 64)), lambda: w8(group=256, scale=(1, 64))),
    case("w8.scales", w8, lambda: w8(scale=(64, 2))),
    case(
        "w8.scales",
        lambda: w8(extra={"antiquant_offset": (H, (2, 64))}),
        lambda: w8(extra={"antiquant_offset": (H, (1, 64))}),
    ),
    case("w8.bias", lambda: w8(extra={"bias": (H, (64,))}), lambda: w8(extra={"bias": (F, (64,))})),
    case(
        "w8.bias", lambda: w8((B, (4, 256)), extra={"bias": (F, (64,))}), lambda: w8((B, (4, 256)), extra={"bias": (B, (64,))})
    ),
    case("w8.even", lambda: w8(weight=(I32, (256, 8))), lambda: w8(weight=(I32, (100, 8)))),
    case("int8.card", lambda: added(H), int8_product),
    case("int8.scale", int8_product, lambda: int8_product((B, (64,)))),
    case("int8.bias", lambda: int8_product(bias=H), lambda: int8_product(bias=B)),
    case("int8.sizes", lambda: int8_product((F, (1,))), lambda: int8_product((F, (32,)))),
    case("int8.sizes", int8_product, lambda: int8_product(rows=(3,))),
    case("quant.rows", lambda: unary("DynamicQuant", H), lambda: unary("DynamicQuant", H, (4, 63))),
    case("swiglu.halves", lambda: unary("SwiGlu", H, dim=-1), lambda: unary("SwiGlu", H, (4, 63), dim=-1)),
    case("matmul_reduce.sizes", reduced, lambda: reduced(x=(H, (4, 65536)), weight=(65536, 32))),
    case("slow.transpose", lambda: transposed((1, 0, 2), (1, 8, 16)), lambda: transposed((1, 0, 2))),
    case("slow.weight_prepared", lambda: prepared(cut=False), lambda: prepared(cut=True)),
    case("slow.constant_arithmetic", lambda: of_weights(alone=False), lambda: of_weights(alone=True)),
    case("slow.cache_joined", lambda: over_images(1), lambda: over_images(2)),
    case(
        "slow.attention_without_lengths",
        fia,
        lambda: fia(extra={"actual_seq_lengths_kv": ()}),  # type: ignore[dict-item]
    ),
    case("slow.w8_template", lambda: w8(group=0, scale=(1, 64)), w8),
    case("slow.w8_template", lambda: w8(weight=(I32, (256, 8))), lambda: w8(weight=(I32, (256, 8)), group=32, scale=(8, 64))),
    case("slow.norm_reshaped", lambda: quantised_norm(reshaped=False), lambda: quantised_norm(reshaped=True)),
    case("slow.separate_collective", lambda: summed(of_product=False), lambda: summed(of_product=True)),
    case("slow.padded_at_run_time", lambda: filled_up(of_product=False), lambda: filled_up(of_product=True)),
    case("fault.mask_beyond_512_keys", lambda: masked((2, 1, 1, 512), keys=512), lambda: masked((2, 1, 1, 513), keys=513)),
    case(
        "fault.query_without_keys",
        lambda: masked((2, 1, 1, 256), inner_precise=2),
        lambda: masked((2, 1, 1, 256)),
    ),
    case("fault.padded_batch", fia, lambda: fia(extra={"actual_seq_lengths_kv": (I64, (1,))})),
    case("fault.shift_of_all_heads", lambda: shifted(8), lambda: shifted(1)),
    case("fault.packed_without_mask", lambda: packed(mask=True), lambda: packed(mask=False)),
    case("fault.int8_products_310p", lambda: added(H), int8_product),
]


def rules_found(graph: GeGraph, card: str) -> set[str]:
    return {finding.rule.id for finding in card_rules.lint(graph, card)}


@pytest.mark.parametrize("each", CASES)
def test_a_rule_finds_what_breaks_it(each: Case) -> None:
    (card, *_) = RULES[each.rule].cards
    assert each.rule not in rules_found(each.passes(), card)
    assert each.rule in rules_found(each.breaks(), card)
    for other in set(card_rules.CARDS) - set(RULES[each.rule].cards):
        assert each.rule not in rules_found(each.breaks(), other)


def test_every_rule_has_a_case_and_says_what_it_has_to() -> None:
    assert {each.values[0].rule for each in CASES} == set(RULES)
    assert sum(rule.severity == "error" for rule in RULES.values()) >= 25
    assert sum(rule.known_fault for rule in RULES.values()) >= 5
    for rule in RULES.values():
        assert set(rule.cards) <= set(card_rules.CARDS) and rule.types and rule.cann, rule.id
        assert rule.what and rule.remedy and not rule.what.endswith(".") and not rule.remedy.endswith("."), rule.id
        assert rule.source.partition(":")[0].count("/") == 1, rule.source


@pytest.mark.parametrize("each", [case for case in CASES if RULES[case.values[0].rule].severity == "error"])
def test_what_passes_has_no_error_at_all(each: Case) -> None:
    """So a twin differs in what the rule is about."""
    (card, *_) = RULES[each.rule].cards
    errors = {f.rule.id for f in card_rules.lint(each.passes(), card) if f.rule.severity == "error"}
    assert not errors - ({"rope.width_310p", "fia.card", "int8.card", "scatter.card"} if card == "310P" else set())


# ---- who applies them


ERRORS_910B = [
    each for each in CASES if RULES[each.values[0].rule].severity == "error" and "910B" in RULES[each.values[0].rule].cards
]


@pytest.mark.parametrize("each", ERRORS_910B)
def test_the_compiler_stops_and_names_what_is_wrong(each: Case) -> None:
    skip_without_torchair()
    with pytest.raises(CardError) as error:
        check_card("decode-4", parse(serialized(each.breaks())), "Ascend910B")
    assert str(error.value).startswith("decode-4 cannot run on Ascend910B: ")
    assert each.rule not in check_card("decode-4", parse(serialized(each.passes())), "Ascend910B")


@pytest.mark.parametrize("each", ERRORS_910B)
def test_the_simulator_refuses_what_a_card_refuses(each: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it could compute it: rules are applied when a graph is opened."""
    skip_without_torchair()
    monkeypatch.setattr(Simulator, "_bind_nodes", lambda _: [])  # what it lacks itself is said first
    with pytest.raises(GeGraphError) as error:
        Simulator(serialized(each.breaks()))
    assert any(f"({rule}, {RULES[rule].source}): {RULES[rule].remedy}" in str(error.value) for rule in RULES)
    Simulator(serialized(each.passes()))
    Simulator(serialized(each.breaks()), card=None)


def test_a_refusal_is_one_sentence_with_its_source_and_remedy() -> None:
    skip_without_torchair()
    with pytest.raises(GeGraphError) as error:
        Simulator(serialized(norm((H, (32,)))))
    assert str(error.value) == (
        "RmsNorm RmsNorm_2: gamma [32] with x [4, 64]; gamma has the last axes of x, and is of its dtype or float32 "
        "(norm.gamma, hicann/ops-nn: norm/rms_norm/docs/aclnnRmsNorm.md): cast and shape gamma when weights are written"
    )


def test_warnings_are_counted() -> None:
    skip_without_torchair()
    assert check_card("vision-1", parse(serialized(transposed((1, 0, 2)))), "Ascend910B") == {"slow.transpose": 1}


# ---- what is known of tensors


def test_a_graph_is_read_back_as_it_was_written() -> None:
    skip_without_torchair()
    graph = layer_norm()
    assert parse(serialized(graph)) == graph


def test_shapes_are_worked_out_where_torchair_noted_a_view() -> None:
    graph = Graph()
    x = graph.input(H, 4, 64)
    product = graph.node("MatMul", {"x1": x, "x2": graph.input(H, 32, 64)}, [(H, (2, 2, 32))], transpose_x2=True)
    halves = graph.node("SwiGlu", {"x": product}, [None], dim=-1)
    view = GraphView(graph.made(halves))
    assert view.tensor(product).shape == (4, 32)
    assert (view.tensor(halves).shape, view.tensor(halves).dtype) == ((4, 16), H)


def test_attention_may_turn_its_output() -> None:
    for layout, expected in (("BNSD", (2, 8, 3, 128)), ("BNSD_BSND", (2, 3, 8, 128))):
        graph = fia((2, 8, 3, 128), input_layout=layout)
        assert GraphView(graph).tensor(graph.outputs[0]).shape == expected


@pytest.mark.parametrize(
    ("parts", "expected"), [(((4, 1), (3,)), (4, 3)), (((), (2, 5)), (2, 5)), (((1, 1), (1,)), (1, 1)), (((0,), (1,)), (0,))]
)
def test_broadcasting(parts: tuple[Shape, ...], expected: Shape) -> None:
    assert shapes.broadcast(*parts) == expected


def test_shapes_that_do_not_broadcast() -> None:
    with pytest.raises(ValueError, match="do not broadcast"):
        shapes.broadcast((2,), (3,))
