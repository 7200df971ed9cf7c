"""Writes into a cache in place."""

from __future__ import annotations

from .rules import NN, Fault, card_rule
from .tensors import NodeView

_SCATTER = f"{NN}: index/scatter/docs/aclnnInplaceScatterUpdate.md"
_QUANT = f"{NN}: index/quant_update_scatter/docs/aclnnInplaceQuantScatter.md"
_BOTH = ("Scatter", "QuantUpdateScatter")


@card_rule(
    "scatter.card",
    "Scatter",
    what="the operator is not supported on this chip",
    cards=("310P",),
    source=_SCATTER,
    remedy="run graphs with a cache op by op (--eager) on this card",
)
def card(node: NodeView) -> Fault:
    return "a write into the cache"


@card_rule(
    "scatter.axis",
    *_BOTH,
    what="the axis that is written is neither the first nor, in 8 bits, the last",
    cards=("910B",),
    source=_SCATTER,
    remedy="put the batch first and the head's elements last",
)
def axis(node: NodeView) -> Fault:
    shape, given = node.shape("var"), node.attribute("axis", 0)
    if shape is None:
        return None
    place = given % len(shape)
    return f"axis {given} of {list(shape)}" if place == 0 or (place == len(shape) - 1 and _quantised(node)) else None


def _quantised(node: NodeView) -> bool:
    return node.node.type == "QuantUpdateScatter"


@card_rule(
    "scatter.rank",
    *_BOTH,
    what="the tensor that is written has 2 to 8 axes (3 to 8 in 8 bits), and updates as many",
    cards=("910B",),
    source=_SCATTER,
    remedy="reshape the cache to [B, K, S, D]",
)
def rank(node: NodeView) -> Fault:
    var, updates = node.shape("var"), node.shape("updates")
    if var is None or updates is None:
        return None
    least = 3 if _quantised(node) else 2
    return None if least <= len(var) <= 8 and len(var) == len(updates) else f"var {list(var)} and updates {list(updates)}"


@card_rule(
    "scatter.indices",
    *_BOTH,
    what="indices have at most two axes, the first as long as updates', in int32 or int64",
    cards=("910B",),
    source=_SCATTER,
    remedy="give a row's start for each row of the batch",
)
def indices(node: NodeView) -> Fault:
    given, updates = node.input("indices"), node.shape("updates")
    if given is None or given.dtype not in (None, "int32", "int64"):
        return f"indices {given}"
    if given.shape is None or updates is None:
        return None
    fits = len(given.shape) <= 2 and (not given.shape or given.shape[0] == updates[0])
    return None if fits else f"indices {list(given.shape)} for updates {list(updates)}"


@card_rule(
    "scatter.updates",
    *_BOTH,
    what="updates differ from the tensor that is written in the axis written and in the batch alone, and are no longer there",
    cards=("910B",),
    source=_SCATTER,
    remedy="reshape updates to the cache's layout",
)
def updates(node: NodeView) -> Fault:
    var, new, given = node.shape("var"), node.shape("updates"), node.attribute("axis", 0)
    if var is None or new is None or len(var) != len(new):
        return None
    place = given % len(var)
    fits = all(a == b or (i in (0, place) and b <= a) for i, (a, b) in enumerate(zip(var, new, strict=True)))
    return None if fits else f"var {list(var)} and updates {list(new)} along axis {given}"


@card_rule(
    "scatter.alignment",
    "QuantUpdateScatter",
    what="the last axis has a multiple of 32 elements, and scales as many: float32 with float16, bfloat16 with bfloat16",
    cards=("910B",),
    source=_QUANT,
    remedy="fill heads up, and cast scales when weights are written",
)
def alignment(node: NodeView) -> Fault:
    var, scales, dtype = node.shape("var"), node.input("quant_scales"), node.dtype("updates")
    if var is not None and var[-1] % 32:
        return f"a last axis of {var[-1]}"
    if scales is None or scales.shape is None or var is None:
        return None
    count = 1
    for size in scales.shape:
        count *= size
    expected = {"float16": "float32", "bfloat16": "bfloat16"}.get(dtype or "")
    wrong = count != var[-1] or (expected and scales.dtype not in (None, expected))
    return f"quant_scales {scales} with updates in {dtype}" if wrong else None
