"""Pass: heads of towers and resamplers are filled up in their weights (weights/head_padding.py), not in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...model_defs.ops import NAMESPACE
from ...weights.head_padding import MULTIPLE, padded_shape, padded_width
from . import fused
from .merging import PRODUCTS
from .rewriting import TracedGraph

# By the name of an op: what takes its arguments, and after them the true width of a head, on which the scale depends.
FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "attention": fused.attention_of_width,
    "padded_attention": fused.padded_attention_of_width,
}


def pad_heads(traced: TracedGraph, functions: Mapping[str, Callable[..., Tensor]] = FUNCTIONS) -> None:
    """Attention within a tower whose heads have another width than Ascend takes gets wider ones from its q, k and v, and so
    does its o. It runs before products are merged."""
    vocabulary: Any = getattr(torch.ops, NAMESPACE)
    wider = {getattr(vocabulary, name).default: function for name, function in functions.items()}
    for node in list(traced.graph.nodes):
        if node.target in wider:
            width = node.meta["val"].shape[-1] // node.args[-1]  # the last argument is the number of heads
            if width % MULTIPLE:
                _pad(traced, node, wider[node.target], width)


def _pad(traced: TracedGraph, attention: Any, function: Callable[..., Tensor], width: int) -> None:
    products, (output,) = attention.args[:3], attention.users
    for product in (*products, output):
        _pad_weights(traced, product, width)
    for product in products:
        product.meta["val"] = _wider(product, width)
    with traced.graph.inserting_before(attention):
        call = traced.graph.call_function(function, (*attention.args, width))
    call.meta = {**attention.meta, "val": _wider(attention, width)}
    attention.replace_all_uses_with(call)
    traced.graph.erase_node(attention)


def _pad_weights(traced: TracedGraph, product: Any, width: int) -> None:
    """The parameters of a product as they are stored."""
    vocabulary: Any = getattr(torch.ops, NAMESPACE)
    assert product.target in [getattr(vocabulary, name).default for name in PRODUCTS], f"{product} is no product"
    for name in (traced.parameters[each] for each in product.args if each in traced.parameters):
        tensor = traced.tensors[name]
        traced.tensors[name] = tensor.new_empty(padded_shape(name, tuple(tensor.shape), width))


def _wider(node: fx.Node, width: int) -> Tensor:
    value: Tensor = node.meta["val"]
    return value.new_empty((*value.shape[:-1], value.shape[-1] // width * padded_width(width)))
