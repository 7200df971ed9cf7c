"""Lowerings of the op vocabulary to operators that torchair converts: aten, `npu` and torchair's own `air` operators.

One small function per op of model_defs/ops.py, with the same arguments (ascend_graph/). torchair is given the table while it
traces a graph, and every op has become its lowering before the first GE node is made. A lowering works on meta tensors alone,
and nothing it makes depends on a length, a position or a slot: those are graph inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from ..model_defs.ops import NAMESPACE
from ..runtime.backends.ascend import torchair_host
from .ascend_graph import attention, candidates, collectives, layers, paged_attention, products


def lowerings() -> dict[OpOverload, Callable[..., Any]]:
    """Every op of the vocabulary with its lowering, for torchair's `custom_decompositions`.

    Loads torchair first, since the operators named there exist from then on; raises ArtifactError where it is missing.
    """
    torchair_host.load()
    vocabulary = getattr(torch.ops, NAMESPACE)
    return {getattr(vocabulary, name).default: function for name, function in LOWERINGS.items()}


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    products.linear, products.linear_w8, products.linear_w4, products.linear_w8a8,
    layers.rms_norm, layers.layer_norm, layers.silu_mul, layers.gelu, layers.quick_gelu, layers.embed, layers.merge_rows,
    layers.take_token, layers.mask_tiles, layers.tile_padding, layers.pad_rows,
    candidates.top_tokens,
    attention.rope, attention.cached_attention, attention.int8_cached_attention, attention.attention,
    attention.padded_attention, attention.cross_attention, paged_attention.paged_attention,
    paged_attention.int8_paged_attention,
    collectives.all_reduce, collectives.all_gather,
)  # fmt: skip
LOWERINGS = {function.__name__: function for function in _FUNCTIONS}
