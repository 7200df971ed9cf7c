"""Pass: a graph takes the stored parts of quantised layers as artifacts for Ascend hold them (weights/ascend_forms.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ...model_defs.config import QUANTS, text_quant
from ...model_defs.ops import NAMESPACE
from ...weights.ascend_forms import packs_features
from .fused import grouped_product_reduced
from .products import linear_packed
from .rewriting import TracedGraph


def take_stored_forms(traced: TracedGraph, packed: Callable[..., Tensor] = linear_packed) -> None:
    """Products in 8 bits take one scale for each column, where the artifact's quantisation has them; those in 4 bits weights
    that are packed along the out features, where sizes allow it, by the function `packed`."""
    vocabulary: Any = getattr(torch.ops, NAMESPACE)
    for node in list(traced.graph.nodes):
        if node.target in (vocabulary.linear_w8.default, grouped_product_reduced) and traced.quant in QUANTS:
            _take_columns(traced, node)
        elif node.target is vocabulary.linear_w4.default:
            _take_packed(traced, node, packed)


def _take_columns(traced: TracedGraph, product: fx.Node) -> None:
    x, qweight, scales, *_ = product.args
    assert isinstance(x, fx.Node) and isinstance(qweight, fx.Node) and isinstance(scales, fx.Node), product
    columns = x.meta["val"].shape[-1]
    for node, width in ((qweight, columns), (scales, 1)):
        tensor = traced.tensors[traced.parameters[node]]
        traced.tensors[traced.parameters[node]] = tensor.new_empty((tensor.shape[0], width))


def _take_packed(traced: TracedGraph, product: fx.Node, packed: Callable[..., Tensor]) -> None:
    x, qweight, scales, bias, *zeros = product.args
    assert isinstance(x, fx.Node) and isinstance(qweight, fx.Node) and isinstance(scales, fx.Node), product
    columns, numbers = x.meta["val"].shape[-1], traced.tensors[traced.parameters[qweight]]
    features, blocks, _ = numbers.shape
    if not packs_features(text_quant(traced.quant), (features, columns)):
        return
    traced.tensors[traced.parameters[qweight]] = numbers.new_empty((columns, features // 8), dtype=torch.int32)
    name = traced.parameters[scales]
    traced.tensors[name] = traced.tensors[name].new_empty((blocks, features))
    with traced.graph.inserting_before(product):
        call = traced.graph.call_function(packed, (x, qweight, scales, bias, *zeros))
    call.meta = dict(product.meta)
    product.replace_all_uses_with(call)
    traced.graph.erase_node(product)
