"""Errors of all operators of a graph -> the first that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch.fx import Node

from .operator_errors import OpError, module_of, op_name

ROUNDED = ("linear_w8", "linear_w4")  # whose kernels round activations to 8 bits, and their definitions do not
EXACT = 2e-4
# Definition and kernel round alike, and whole numbers add up exactly: all that is left is a rounding that falls the other way.
WHOLE = {"linear_w8a8": 5e-3}


def named_culprit(found: Mapping[Node, OpError], limit: float) -> OpError | None:
    """Where values are found by name: the first operator with an error, or one that is missing right before it."""
    for node, error in found.items():
        if error.error is None or error.error <= allowed(error, limit):
            continue
        missing = _missing_before(node, found)
        if missing is not None:
            return OpError(
                module=missing.module, op=missing.op, shape=missing.shape, error=error.error, drift=error.drift,
                note="the compiled graph has no such operator", rank=error.rank,
            )  # fmt: skip
        return _told_by_cache(node, found) or error
    return None


def _told_by_cache(node: Node, found: Mapping[Node, OpError]) -> OpError | None:
    """What the rows written say of cached attention that went wrong: they may explain the rest."""
    items = node.all_input_nodes[0].users if _is_item(node) else ()
    return next((found[item] for item in items if item in found and found[item].note), None)


def allowed(error: OpError, limit: float) -> float:
    """`limit` is for operators that round; all others are exact."""
    return limit if error.op in ROUNDED else min(limit, WHOLE.get(error.op, EXACT))


def _missing_before(node: Node, found: Mapping[Node, OpError]) -> OpError | None:
    """An operator without a value between this one and the nearest values before it."""
    waiting, last = list(node.all_input_nodes), None
    while waiting:
        each = waiting.pop(0)
        error = found.get(each)
        if each.op == "placeholder" or (error is not None and error.error is not None):
            continue
        if error is not None and not _reshapes(each):
            last = error
        waiting += each.all_input_nodes
    return last


def _reshapes(node: Node) -> bool:
    return op_name(node).startswith(("aten.view", "aten.reshape", "aten.permute", "aten.unsqueeze", "aten.slice", "<built-in"))


def matched_culprit(found: Mapping[Node, OpError]) -> OpError | None:
    """Where values are found by their contents: the first operator whose value is nowhere, nor any value made of it.

    A compiler may fuse operators, so a value that is missing means nothing while something behind it is there.
    """
    good: set[Node] = set()
    for node in reversed([*found]):
        if found[node].error is not None or any(user in good for user in _users(node)):
            good.add(node)
    for node, error in found.items():
        if node not in good and node.users:
            return error
    return None


def whole_culprit(found: Mapping[Node, OpError]) -> OpError | None:
    """Where nothing but outputs can be seen: the first that is wrong, in which operators before it have their part."""
    note = "of this graph only outputs can be seen, so an operator before this one may be at fault"
    wrong = (error for error in found.values() if error.error is not None and error.error > EXACT)
    return next((dataclasses.replace(error, note=error.note or note) for error in wrong), None)


def _users(node: Node) -> list[Node]:
    """Who reads a value, or an item of it."""
    direct = list(node.users)
    return direct + [user for each in direct if each.op == "call_function" for user in each.users if _is_item(each)]


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def layer_errors(found: Mapping[Node, OpError]) -> dict[str, tuple[float, float]]:
    """By layer, in order: the largest error of its own operators, and the drift of its last value."""
    errors: dict[str, tuple[float, float]] = {}
    for node, error in found.items():
        if error.error is None or error.drift is None:
            continue
        layer = layer_of(module_of(node))
        worst = max(errors.get(layer, (0.0, 0.0))[0], error.error)
        errors[layer] = worst, error.drift if not error.what else errors.get(layer, (0.0, error.drift))[1]
    return errors


def layer_of(module: str) -> str:
    """text.layers.3.attn.q -> text.layers.3; text.norm -> text.norm."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:2])
