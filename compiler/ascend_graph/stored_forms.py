"""Pass: a graph takes the stored parts of quantised layers as artifacts for Ascend hold them (weights/ascend_forms.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...model_defs.config import QUANTS
from ...model_defs.ops import NAMESPACE
from .rewriting import TracedGraph


def take_stored_forms(traced: TracedGraph) -> None:
    """Products in 8 bits take one scale for each column, where the artifact's quantisation has them."""
    vocabulary: Any = getattr(torch.ops, NAMESPACE)
    for node in list(traced.graph.nodes):
        if node.target is vocabulary.linear_w8.default and traced.quant in QUANTS:
            _take_columns(traced, node)


def _take_columns(traced: TracedGraph, product: fx.Node) -> None:
    x, qweight, scales, *_ = product.args
    assert isinstance(x, fx.Node) and isinstance(qweight, fx.Node) and isinstance(scales, fx.Node), product
    columns = x.meta["val"].shape[-1]
    for node, width in ((qweight, columns), (scales, 1)):
        tensor = traced.tensors[traced.parameters[node]]
        traced.tensors[traced.parameters[node]] = tensor.new_empty((tensor.shape[0], width))
