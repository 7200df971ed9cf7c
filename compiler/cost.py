"""The cost of one run of a graph on any machine: floating-point operations, and bytes that have to be read or written.

Counted op by op while the definition runs on tensors without data, which takes a tenth of the time of a trace: products of
matrices and attention are counted, the rest is small beside them. An attention step is counted over the whole cache, which is
what a graph may have to read. Weights, caches and inputs are read once; values between ops stay where they are.

For a rank of several, its collectives are counted, and the bytes that it contributes to them; the traffic that this causes
depends on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..model_defs.ops import COLLECTIVES, NAMESPACE
from ..runtime.artifact import TensorSpec, WeightSpec, is_cached
from .graphs import GraphDef, example_inputs
from .weight_views import stored_bytes

_COLLECTIVES = {f"{NAMESPACE}.{name}" for name in COLLECTIVES}
_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one run; the bound of a device is max(flops / its FLOP/s, nbytes / its bytes/s)."""

    flops: int
    nbytes: int
    collectives: int = 0  # calls
    collective_bytes: int = 0  # that the rank contributes to them


def graph_cost(graph: GraphDef, dtype: str, stored: Mapping[str, WeightSpec] | None = None) -> Cost:
    """The cost of a graph whose cache is stored in `dtype`, and its weights as `stored` says, else in `dtype` too (integers of
    8 bits stay as they are)."""
    calls = _calls(graph)
    flops = sum(_FLOPS[name](args) for name, args in calls if name in _FLOPS)
    width = _WIDTHS[dtype]
    nbytes = {
        name: stored_bytes(stored or {}, name, p.shape) or p.numel() * (width if p.is_floating_point() else p.element_size())
        for name, p in graph.module.named_parameters()
    }
    inputs = sum(_elements(graph, spec) * (width if _in_floats(spec) else _WIDTHS[spec.dtype]) for spec in graph.inputs)
    contributed = [args[0].numel() * width for name, args in calls if name in _COLLECTIVES]
    return Cost(
        flops=flops,
        nbytes=sum(nbytes.values()) - _unread(graph, nbytes) + inputs,
        collectives=len(contributed),
        collective_bytes=sum(contributed),
    )


def _in_floats(spec: TensorSpec) -> bool:
    """Whether an input is a part of the cache that is not in 8 bits."""
    return is_cached(spec.name) and spec.dtype != "int8"


def _elements(graph: GraphDef, spec: TensorSpec) -> int:
    """The elements of an input that a run may have to read: of a cache in pages, those of as many pages as its table has
    entries."""
    table = next((each for each in graph.inputs if each.name == "block_table"), None)
    if table is None or "_cache." not in spec.name:
        return math.prod(spec.shape)
    return min(math.prod(table.shape), spec.shape[0]) * math.prod(spec.shape[1:])


def _unread(graph: GraphDef, nbytes: Mapping[str, int]) -> int:
    """Bytes of the embedding table that a run does not look up."""
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    if "token_ids" not in shapes:
        return 0
    rows = len(dict(graph.module.named_parameters())["text.embed.weight"])
    return max(0, rows - math.prod(shapes["token_ids"])) * (nbytes["text.embed.weight"] // rows)


def _calls(graph: GraphDef) -> list[tuple[str, tuple[Any, ...]]]:
    """Every op of one run in order, and its arguments."""
    listed = _Listed()
    with torch.no_grad(), listed:
        graph.module(*example_inputs(graph))
    return listed.calls


class _Listed(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func).removesuffix(".default"), args))
        return func(*args, **(kwargs or {}))


def _linear(args: tuple[Tensor, ...]) -> int:
    """2 K N for each row of x [..., K] and weight [N, K]."""
    return 2 * args[0].numel() * args[1].shape[0]


def _attention(args: tuple[Tensor, ...]) -> int:
    """Scores and weighted values: 4 T S H D for each row of q [B, T, H*D] and k [B, S, H*D]."""
    return 4 * args[0].numel() * args[1].shape[1]


def _cached_attention(args: tuple[Tensor, ...]) -> int:
    """As above, S being the rows of the cache [B, K, S, D]."""
    return 4 * args[0].numel() * args[3].shape[2]


def _paged_attention(args: tuple[Any, ...]) -> int:
    """As above, S being the tokens of the pages [Z, P, K, D] that block_table [B, W] names; after it come slot_mapping and the
    number of heads."""
    return 4 * args[0].numel() * args[3].shape[1] * args[-3].shape[1]


def _cross_attention(args: tuple[Any, ...]) -> int:
    """As above, S being the keys [B, K, X, D] of all images."""
    return 4 * args[0].numel() * sum(each.shape[2] for each in args[1])


_FLOPS: dict[str, Callable[[tuple[Any, ...]], int]] = {
    f"{NAMESPACE}.linear": _linear,
    f"{NAMESPACE}.linear_w8": _linear,
    f"{NAMESPACE}.linear_w4": _linear,
    f"{NAMESPACE}.linear_w8a8": lambda args: 2 * args[0].numel() * args[1].shape[1],  # weight [K, N]
    f"{NAMESPACE}.attention": _attention,
    f"{NAMESPACE}.padded_attention": _attention,
    f"{NAMESPACE}.cached_attention": _cached_attention,
    f"{NAMESPACE}.int8_cached_attention": _cached_attention,
    f"{NAMESPACE}.paged_attention": _paged_attention,
    f"{NAMESPACE}.int8_paged_attention": _paged_attention,
    f"{NAMESPACE}.cross_attention": _cross_attention,
}
