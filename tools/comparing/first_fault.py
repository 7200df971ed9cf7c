"""The first wrong operator of a graph, from the errors of all its operators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch.fx import Node

from ...compiler.tracing import module_path
from .operator_errors import OpError, op_name

ROUNDED = ("linear_w8", "linear_w4")  # their kernels round activations to 8 bits, their definitions do not
EXACT = 2e-4
# Definition and kernel round alike, and integers add up exactly: only roundings of ties may differ.
WHOLE = {"linear_w8a8": 5e-3}


def first_fault_by_name(errors: Mapping[Node, OpError], limit: float) -> OpError | None:
    """The first operator with an error, or one that is missing right before it, where values are matched by name."""
    for node, error in errors.items():
        if error.error is None or error.error <= allowed(error, limit):
            continue
        missing = _missing_before(node, errors)
        if missing is not None:
            return OpError(
                module=missing.module, op=missing.op, shape=missing.shape, error=error.error, drift=error.drift,
                note="the compiled graph has no such operator", rank=error.rank,
            )  # fmt: skip
        return _cache_error(node, errors) or error
    return None


def _cache_error(node: Node, errors: Mapping[Node, OpError]) -> OpError | None:
    """The error of the rows that faulty cached attention has written, if it has a note, which may explain the rest."""
    items = node.all_input_nodes[0].users if _is_item(node) else ()
    return next((errors[item] for item in items if item in errors and errors[item].note), None)


def allowed(error: OpError, limit: float) -> float:
    """The error that an operator may have: `limit` for those that round; all others are exact."""
    return limit if error.op in ROUNDED else min(limit, WHOLE.get(error.op, EXACT))


def _missing_before(node: Node, errors: Mapping[Node, OpError]) -> OpError | None:
    """An operator without a value between this one and the nearest values before it."""
    waiting, last = list(node.all_input_nodes), None
    while waiting:
        each = waiting.pop(0)
        error = errors.get(each)
        if each.op == "placeholder" or (error is not None and error.error is not None):
            continue
        if error is not None and not _reshapes(each):
            last = error
        waiting += each.all_input_nodes
    return last


def _reshapes(node: Node) -> bool:
    return op_name(node).startswith(("aten.view", "aten.reshape", "aten.permute", "aten.unsqueeze", "aten.slice", "<built-in"))


def first_fault_by_content(errors: Mapping[Node, OpError]) -> OpError | None:
    """The first operator with neither its value nor any value made of it in the graph, where values are matched by contents.

    A compiler may fuse operators, so a value may be missing while one made of it is there.
    """
    present: set[Node] = set()
    for node in reversed([*errors]):
        if errors[node].error is not None or any(user in present for user in _users(node)):
            present.add(node)
    for node, error in errors.items():
        if node not in present and node.users:
            return error
    return None


def first_faulty_output(errors: Mapping[Node, OpError]) -> OpError | None:
    """The first wrong output, where only outputs are visible; operators before it may be at fault."""
    note = "only the outputs of this graph are visible, so an operator before this one may be at fault"
    wrong = (error for error in errors.values() if error.error is not None and error.error > EXACT)
    return next((dataclasses.replace(error, note=error.note or note) for error in wrong), None)


def _users(node: Node) -> list[Node]:
    """The nodes that read a value, or an item of it."""
    direct = list(node.users)
    return direct + [user for each in direct if each.op == "call_function" for user in each.users if _is_item(each)]


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def layer_errors(operators: Mapping[Node, OpError]) -> dict[str, tuple[float, float]]:
    """By layer, in order: the largest error of its own operators, and the drift of its last value."""
    layers: dict[str, tuple[float, float]] = {}
    for node, error in operators.items():
        if error.error is None or error.drift is None:
            continue
        layer = layer_of(module_path(node))
        worst = max(layers.get(layer, (0.0, 0.0))[0], error.error)
        layers[layer] = worst, error.drift if not error.output else layers.get(layer, (0.0, error.drift))[1]
    return layers


def layer_of(module: str) -> str:
    """text.layers.3.attn.q -> text.layers.3; text.norm -> text.norm."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:2])
