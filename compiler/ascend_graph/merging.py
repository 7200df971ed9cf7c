"""Passes that make one product of linear layers with the same input, over the merged weights of weights/merging.py."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...model_defs.ops import NAMESPACE
from ...weights.merged_tensors import rows_axis
from ...weights.merging import complete_groups
from .operators import aten, npu
from .rewriting import TracedGraph

PRODUCTS = ("linear", "linear_w8", "linear_w4", "linear_w8a8")


def merge_products(traced: TracedGraph) -> None:
    """Products with the weights of a group's members become one with the merged weights, and a split of what it gives.

    A graph that has a layer has all of its members, and they take the same input; whatever is stored merged is read merged.
    """
    nodes = {name: node for node, name in traced.parameters.items()}
    groups = {name: [nodes[each] for each in members] for name, members in complete_groups(nodes).items()}
    merged = {name: _merge_parameter(traced, name, members) for name, members in groups.items()}
    replaced = {member: merged[name] for name, members in groups.items() for member in members}
    for name, members in groups.items():
        if not name.endswith((".bias", ".scales", ".zeros")):
            _merge_group(traced, members, replaced)
    for member in replaced:
        traced.graph.erase_node(member)
        del traced.tensors[traced.parameters.pop(member)]


def note_biases(traced: TracedGraph) -> None:
    """Note which biases are added within a product: MatMul of bfloat16 takes them in float32."""
    for node in traced.graph.nodes:
        if node.target in _ops(*PRODUCTS):
            bias = next((each for each in node.args[1:] if "bias" in traced.parameters.get(each, "")), None)
            traced.biases.update([traced.parameters[bias]] if bias else [])


def _merge_parameter(traced: TracedGraph, name: str, members: Sequence[fx.Node]) -> fx.Node:
    """A placeholder for a merged parameter, where its first member's is."""
    tensors = [traced.tensors[traced.parameters[each]] for each in members]
    with traced.graph.inserting_before(members[0]):
        node = traced.graph.placeholder(f"p_{name.replace('.', '_')}")
    traced.parameters[node] = name
    traced.tensors[name] = torch.cat(tensors, dim=rows_axis(name, tensors[0].dtype))
    return node


def _merge_group(traced: TracedGraph, weights: Sequence[fx.Node], replaced: Mapping[fx.Node, fx.Node]) -> None:
    """One product in place of those that take `weights`, the weights of a group's members."""
    products = [_only_user(each) for each in weights]
    assert len({(each.target, each.args[0]) for each in products}) == 1, f"{products} differ in what they do, or to what"
    rows = [_rows(traced, each) for each in weights]
    first = min(products)  # in the order of the graph
    arguments: list[Any] = [replaced.get(each, each) if isinstance(each, fx.Node) else each for each in first.args[1:]]
    with traced.graph.inserting_before(first):
        product = traced.graph.create_node("call_function", first.target, (first.args[0], *arguments))
        product.meta["val"] = _with_features(first, sum(rows))
        parts = traced.graph.call_function(aten.split_with_sizes.default, (product, rows, -1))
        items = [traced.graph.call_function(operator.getitem, (parts, place)) for place in range(len(products))]
    for each, item in zip(products, items, strict=True):
        item.meta = dict(each.meta)
        each.replace_all_uses_with(item)
        traced.graph.erase_node(each)


def _only_user(weight: fx.Node) -> fx.Node:
    (user,) = weight.users
    assert user.target in _ops(*PRODUCTS), f"{weight} is read by {user}, which is no product"
    return user


def _rows(traced: TracedGraph, weight: fx.Node) -> int:
    name = traced.parameters[weight]
    tensor = traced.tensors[name]
    return tensor.shape[rows_axis(name, tensor.dtype)]


def _with_features(product: fx.Node, features: int) -> Any:
    value = product.meta["val"]
    return value.new_empty((*value.shape[:-1], features))


def join_swiglu(traced: TracedGraph) -> None:
    """silu_mul of both halves of one product: SwiGlu takes them in one tensor, as the product leaves them."""
    for node in list(traced.graph.nodes):
        if node.target in _ops("silu_mul") and (product := _halved(*node.args)) is not None:
            with traced.graph.inserting_before(node):
                joined = traced.graph.call_function(npu.npu_swiglu.default, (product, -1))
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)
            traced.graph.erase_node(node)


def _halved(gate: Any, up: Any) -> Any:
    """The value whose first and second half `gate` and `up` are, along its last axis; None if they are not."""
    if gate.target is not operator.getitem or up.target is not operator.getitem:
        return None
    (parts, first), (others, second) = gate.args, up.args
    halves = parts is others and parts.target is aten.split_with_sizes.default and (first, second) == (0, 1)
    return parts.args[0] if halves and len(set(parts.args[1])) == 1 and parts.args[2] == -1 else None


def _ops(*names: str) -> tuple[Any, ...]:
    vocabulary = getattr(torch.ops, NAMESPACE)
    return tuple(getattr(vocabulary, name).default for name in names)
