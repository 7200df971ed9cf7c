"""A quantised lm_head of many features as one product for each of its stored pieces (weights/head_pieces.py)."""

from __future__ import annotations

import torch
from torch import fx

from ...model_defs.ops import NAMESPACE
from ...weights.head_pieces import HEAD, piece_name, piece_rows
from .operators import aten
from .rewriting import TracedGraph


def cut_head(traced: TracedGraph) -> None:
    """The products of the pieces, joined; a head that is not cut, or not quantised, is left alone."""
    weights = {name: node for node, name in traced.parameters.items() if name.startswith(f"{HEAD}.")}
    qweight = weights.get(f"{HEAD}.qweight")
    if qweight is None or len(sizes := piece_rows(traced.tensors[f"{HEAD}.qweight"].shape[0])) == 1:
        return
    (product,) = qweight.users
    assert product.target is getattr(torch.ops, NAMESPACE).linear_w8.default, f"{product} is no product in 8 bits"
    pieces = [_piece(traced, product, weights, place, sizes) for place in range(len(sizes))]
    with traced.graph.inserting_before(product):
        joined = traced.graph.call_function(aten.cat.default, (pieces, -1))
    joined.meta = dict(product.meta)
    product.replace_all_uses_with(joined)
    traced.graph.erase_node(product)
    for name, node in weights.items():
        traced.graph.erase_node(node)
        del traced.parameters[node], traced.tensors[name]


def _piece(traced: TracedGraph, product: fx.Node, weights: dict[str, fx.Node], place: int, sizes: tuple[int, ...]) -> fx.Node:
    """The product of one piece, which is a parameter of its own."""
    nodes: dict[fx.Node, fx.Node] = {}
    for name, whole in weights.items():
        part, stored = piece_name(name, place), traced.tensors[name]
        with traced.graph.inserting_before(whole):
            nodes[whole] = traced.graph.placeholder(f"p_{part.replace('.', '_')}")
        traced.parameters[nodes[whole]] = part
        traced.tensors[part] = stored.new_empty((sizes[place], *stored.shape[1:]))
    arguments = tuple(nodes.get(each, each) if isinstance(each, fx.Node) else each for each in product.args)
    with traced.graph.inserting_before(product):
        piece = traced.graph.call_function(product.target, arguments)  # pyright: ignore[reportArgumentType]
    value = product.meta["val"]
    piece.meta["val"] = value.new_empty((*value.shape[:-1], sizes[place]))
    return piece
