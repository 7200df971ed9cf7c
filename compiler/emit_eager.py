"""A graph definition -> a program of plain torch operators, run one by one: the fallback for a graph kind that the device's
compiler cannot take.

The program is the definition itself, op by op as model_defs/ops.py writes it, so it needs no fused operator and no torchair;
it is slower, it dequantises quantised weights in every product (eager_products.py), and it copies the cache at every step. It
is stored as Python source that names nothing but torch operators, and takes and returns the same tensors as a compiled kernel
(see emit_ascend.py). Collectives call the group in its scope.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..model_defs import ops
from . import eager_attention, eager_products
from .ascend_graph.attention import HIDDEN_BELOW
from .ascend_graph.head import cut_head
from .ascend_graph.head_padding import pad_heads
from .ascend_graph.merging import merge_products, note_biases
from .ascend_graph.stored_forms import take_stored_forms
from .emit_ascend import Emitted, make_kernel
from .graphs import GraphDef

REWRITES = (
    functools.partial(pad_heads, functions=eager_attention.FUNCTIONS),
    merge_products,
    note_biases,
    cut_head,
    functools.partial(take_stored_forms, packed=eager_products.linear_packed),
)
HIDDEN = -3e4  # added to a masked score of 16 bits
# Names in the scope of the program: its device, its dtype, and its group of ranks.
DEVICE, HALF, GROUP = "device", "half", "group"


def emit(definition: GraphDef, dtype: str) -> Emitted:
    """The program of one graph, computing in float16 or bfloat16."""
    kernel = make_kernel(definition, getattr(torch, dtype), REWRITES)
    method = getattr(kernel.module, kernel.name)
    program = make_fx(method, decomposition_table=_definitions(), tracing_mode="fake")(*kernel.arguments)
    source = program.code.replace("device(type='meta')", DEVICE).replace(f"torch.{dtype}", HALF)
    for op in ops.COLLECTIVES:
        source = source.replace(f"torch.ops.{ops.NAMESPACE}.{op}.default(", f"{GROUP}.{op}(")
    return Emitted(
        name=kernel.name,
        data=source.strip().encode() + b"\n",
        graph=b"",
        weights=kernel.weights,
        constants=kernel.constants,
        outputs_in_place=kernel.outputs_in_place,
    )


def _definitions() -> dict[Any, Callable[..., Any]]:
    """Every op of the vocabulary -> the function that defines it, in the dtype of the weights; without collectives, which need
    a run."""
    namespace = getattr(torch.ops, ops.NAMESPACE)
    functions = {name: function for name, function in ops.DEFINITIONS.items() if name not in ops.COLLECTIVES}
    functions |= {"linear": _linear, "cross_attention": _cross_attention, **eager_products.FUNCTIONS}
    return {getattr(namespace, name).default: function for name, function in functions.items()}


def _cross_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """The definition masks with a number that 16 bits cannot hold. A token that sees nothing has a query of zeros and no mask:
    it attends evenly to everything, as in the definition."""
    hidden = mask < HIDDEN_BELOW  # [B, T, n * t]
    sees = (~hidden).any(-1, keepdim=True)
    mask = (hidden & sees).to(q.dtype) * HIDDEN
    return ops.DEFINITIONS["cross_attention"](q * sees.to(q.dtype), keys, values, mask, heads)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition upcasts a narrow weight; here wide inputs, the normalised pixels, are cast to the weight's dtype, and so
    are biases that are stored in float32."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
