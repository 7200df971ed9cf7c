"""Passes that put one fused operator in place of several ops of the vocabulary, over the trace of a definition.

The definitions stay as they are, for all backends; what a pass makes of them is lowered by fused.py. Every pass looks for a
pattern and leaves everything else alone, so a graph without the pattern stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ...model_defs.ops import NAMESPACE
from ...runtime.artifact import IN_FLOAT32
from . import fused
from .operators import aten, npu
from .products import MOST_W8_FEATURES
from .rewriting import Rewrite, TracedGraph

VOCABULARY: Any = getattr(torch.ops, NAMESPACE)
# ApplyRotaryPosEmb takes heads of this width alone (ops-transformer, posembedding/apply_rotary_pos_emb/README.md).
ROTARY_WIDTH = 128
CACHED = (VOCABULARY.cached_attention.default, VOCABULARY.paged_attention.default)
INT8_CACHED = {
    VOCABULARY.int8_cached_attention.default: fused.int8_cached_attention,
    VOCABULARY.int8_paged_attention.default: fused.int8_paged_attention,
}
VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
# What DequantSwigluQuant holds of its operands on a 910B, in bytes (ops-nn, quant/dequant_swiglu_quant/README.md).
SWIGLU_MEMORY = 192 * 1024


def fuse_rotary(traced: TracedGraph) -> None:
    """rope of the queries and rope of the keys of one attention -> rope_of_both, where heads are ROTARY_WIDTH wide."""
    for attention in _calls(traced, *CACHED, *INT8_CACHED):
        q, k = (_rope_of(each) for each in attention.args[:2])
        if q is None or k is None or q.args[1:] != k.args[1:] or _shape(q.args[1])[-1] != ROTARY_WIDTH:
            continue
        if all(k < user for user in q.users):  # the fused one stands where the later of the two stood
            both = _insert(traced, k, fused.rope_of_both, q.args[0], *k.args)
            _replace({q: _item(traced, both, 0, q), k: _item(traced, both, 1, k)})


def _rope_of(x: Any) -> fx.Node | None:
    """The rope that gives x, directly or before it is multiplied (by the query_scale of Qwen-VL)."""
    if x.target is aten.mul.Tensor:
        x = x.args[0]
    return x if x.target is VOCABULARY.rope.default else None


def fuse_add_norms(traced: TracedGraph) -> None:
    """An addition and the rms_norm of its sum, also of a view of it -> add_rms_norm; others go on reading the sum."""
    for norm in _calls(traced, VOCABULARY.rms_norm.default):
        x, weight, eps = norm.args
        view = x if x.target in VIEWS and len(x.users) == 1 else None
        total = view.args[0] if view else x
        if not _is_sum(total) or _shape(total)[-1] != _shape(norm)[-1]:
            continue
        both = _insert(traced, total, fused.add_rms_norm, *total.args, weight, eps)
        normed = _item(traced, both, 0, total)
        _replace({total: _item(traced, both, 1, total)})
        if view:  # of what is normalised, in place of what is to be
            view.args = (normed, *view.args[1:])
        _replace({norm: view or normed})


def _is_sum(node: Any) -> bool:
    """Whether node adds two tensors of its own shape."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    return all(isinstance(each, fx.Node) and _shape(each) == _shape(node) for each in node.args)


def quantise_once(traced: TracedGraph) -> None:
    """linear_w8a8 -> rows quantised once for all products of one input, and the products of those rows.

    A product takes a tensor beside them whose type is that of its result.
    """
    rows_of: dict[Any, tuple[fx.Node, fx.Node]] = {}
    for product in _calls(traced, VOCABULARY.linear_w8a8.default):
        x, qweight, scales, bias = product.args[:4]
        if x not in rows_of:
            rows_of[x] = _rows(traced, _insert(traced, product, fused.quantised_rows, x))
        operands = (*rows_of[x], qweight, scales, bias, x, list(_shape(product)))
        _replace({product: _like(product, _insert(traced, product, fused.product_of_rows, *operands))})


def fuse_norms_with_rows(traced: TracedGraph) -> None:
    """A norm of which nothing but its quantised rows is read -> a norm that gives them."""
    for quantised in _calls(traced, fused.quantised_rows):
        norm = quantised.args[0]
        if not _only_quantised(quantised):
            continue
        if norm.target is VOCABULARY.rms_norm.default:
            rows = _rows(traced, _insert(traced, norm, fused.rms_norm_quantised, *norm.args))
            _take_rows(quantised, rows, norm.args[0])
        elif norm.target is operator.getitem and norm.args[0].target is fused.add_rms_norm and norm.args[1] == 0:
            both = norm.args[0]
            made = _insert(traced, both, fused.add_rms_norm_quantised, *both.args)
            rows, total = _rows(traced, made), _item(traced, made, 2, norm)
            _replace({each: total for each in list(both.users) if each.args[1] == 1})
            _take_rows(quantised, rows, total)


def fuse_swiglu_with_rows(traced: TracedGraph) -> None:
    """A product of rows whose result goes through SwiGlu into quantised rows alone -> the product in whole numbers, scaled by
    the operator that does the rest, as far as its memory reaches."""
    for quantised in _calls(traced, fused.quantised_rows):
        swiglu = quantised.args[0]
        if swiglu.target is not npu.npu_swiglu.default or not _only_quantised(quantised):
            continue
        product = swiglu.args[0]
        if product.target is fused.product_of_rows and len(product.users) == 1:
            rows, row_scales, qweight, scales, bias, like, shape = product.args
            if bias is None and swiglu_fits(shape):
                made = _insert(traced, swiglu, fused.swiglu_quantised, rows, row_scales, qweight, scales)
                _take_rows(quantised, _rows(traced, made), like)


def swiglu_fits(shape: Any) -> bool:
    """Whether DequantSwigluQuant takes an x [..., 2 I] int32: its documents count the scales of the columns, a fortieth of
    those of the rows on both sides, and ten rows of x."""
    *rows, columns = shape
    count = 1
    for size in rows:
        count *= size
    return 4 * columns + 2 * 4 * count / 40 + 10 * 4 * columns < SWIGLU_MEMORY


def _only_quantised(quantised: Any) -> bool:
    """Whether `quantised` is the only reader of what is quantised, and the products of its rows for its type."""
    products = {user for item in quantised.users for user in item.users}
    return all(user is quantised or user in products for user in quantised.args[0].users)


def _take_rows(quantised: Any, rows: tuple[fx.Node, fx.Node], like: fx.Node) -> None:
    """Let the products of `quantised` take other rows, and the type of `like`."""
    for item in quantised.users:
        for product in list(item.users):
            product.replace_input_with(quantised.args[0], like)
    _replace({item: rows[item.args[1]] for item in quantised.users})


def take_scales_in_float32(traced: TracedGraph) -> None:
    """A cache in 8 bits: the scales of its channels are given in float32, too, in which new rows are divided by them."""
    for attention in _calls(traced, *INT8_CACHED):
        steps = [_in_float32(traced, _parameter(traced, each)) for each in attention.args[5:7]]
        with_steps = _insert(traced, attention, INT8_CACHED[attention.target], *attention.args, *steps)
        _replace({attention: _like(attention, with_steps)})


def _parameter(traced: TracedGraph, node: Any) -> fx.Node:
    """The placeholder of the parameter that node is a view of."""
    while node not in traced.parameters:
        assert node.target in VIEWS, f"{node} is no view of a parameter"
        node = node.args[0]
    return node


def _in_float32(traced: TracedGraph, parameter: fx.Node) -> fx.Node:
    """A placeholder for the same parameter in float32."""
    name = traced.parameters[parameter]
    with traced.graph.inserting_after(parameter):
        node = traced.graph.placeholder(f"{parameter.name}_float32")
    traced.parameters[node] = name + IN_FLOAT32
    traced.tensors[name + IN_FLOAT32] = traced.tensors[name]
    return _like(parameter, node)


def fuse_all_reduce(traced: TracedGraph) -> None:
    """A product and the sum of it over the ranks -> one operator, which sends parts while it computes others.

    Products that have no such form stay as they are: those in 4 bits, of blocks that are filled up, and of too many features.
    """
    for reduced in _calls(traced, VOCABULARY.all_reduce.default):
        product, ranks = reduced.args
        if len(product.users) == 1 and (operands := _reducible(product)):
            _replace({reduced: _like(reduced, _insert(traced, reduced, *operands, ranks))})


def _reducible(product: Any) -> tuple[Any, ...]:
    """The fused op of a product without a bias, and its operands but for the ranks; () where there is none."""
    if product.target is VOCABULARY.linear.default and product.args[2] is None:
        return fused.product_reduced, *product.args[:2]
    if product.target is fused.product_of_rows and product.args[4] is None:
        rows, row_scales, qweight, scales, _, like, shape = product.args
        return fused.product_of_rows_reduced, rows, row_scales, qweight, scales, like, shape
    if product.target is VOCABULARY.linear_w8.default and product.args[3] is None:
        x, qweight, scales, _, *zeros = product.args
        features, blocks, block = _shape(qweight)
        if blocks * block == _shape(x)[-1] and features <= MOST_W8_FEATURES:
            return fused.grouped_product_reduced, x, qweight, scales, zeros[0] if zeros else None
    return ()


# In this order: norms are fused before rows are quantised in them.
FUSIONS: tuple[Rewrite, ...] = (
    fuse_rotary,
    fuse_add_norms,
    quantise_once,
    fuse_norms_with_rows,
    fuse_swiglu_with_rows,
    take_scales_in_float32,
)


# ---- nodes


def _calls(traced: TracedGraph, *targets: Callable[..., Any]) -> list[Any]:
    """The calls of functions (nodes), in the order of the graph. fx lets arguments be more than the nodes that ours are."""
    return [node for node in traced.graph.nodes if node.op == "call_function" and node.target in targets]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _insert(traced: TracedGraph, before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    with traced.graph.inserting_before(before):
        return traced.graph.call_function(target, args)


def _item(traced: TracedGraph, source: fx.Node, index: int, like: fx.Node) -> fx.Node:
    """One of several results, of the shape of `like`."""
    with traced.graph.inserting_after(source):
        return _like(like, traced.graph.call_function(operator.getitem, (source, index)))


def _rows(traced: TracedGraph, source: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Quantised rows and their scales, the first two results."""
    return _item(traced, source, 0, source), _item(traced, source, 1, source)


def _like(example: fx.Node, node: fx.Node) -> fx.Node:
    node.meta = dict(example.meta)
    return node


def _replace(nodes: Mapping[fx.Node, fx.Node]) -> None:
    """Let readers of the nodes read others. The nodes go, and what only they read goes with the graph's dead code."""
    for old, new in nodes.items():
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
