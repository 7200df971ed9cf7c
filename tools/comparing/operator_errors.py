"""Operator by operator: what a compiled graph made of its own values, against what each operator's definition makes of them.

Every operator is given the compiled graph's values for its inputs, so an error is the operator's own: nothing adds up on the
way, and the first operator that is wrong is where the fault is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .metrics import relative_error

Find = Callable[[Node, Tensor], Tensor | None]  # the compiled graph's value of a traced node; given what is expected
WRITTEN = {1: "keys written", 2: "values written"}  # outputs of cached attention


@dataclass(frozen=True, slots=True)
class OpError:
    """One operator of a graph. `error` is None where the compiled graph has no such value."""

    module: str  # e.g. text.layers.3.attn
    op: str
    shape: tuple[int, ...]
    error: float | None
    drift: float | None  # against the definition's own run from the graph's inputs on
    what: str = ""  # which output, where there are several
    note: str = ""
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.module} {self.op}" + (f" ({self.what})" if self.what else "")


class Walk:
    """One traced graph over its parameters."""

    def __init__(self, program: torch.export.ExportedProgram, parameters: Mapping[str, Tensor]) -> None:
        self.nodes = [node for node in program.graph.nodes if node.op in ("placeholder", "call_function")]
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.user_inputs = list(signature.user_inputs)
        self.parameters = parameters

    @torch.inference_mode()
    def run(self, inputs: list[Tensor], find: Find) -> dict[Node, OpError]:
        """Every operator's error, in order. `inputs` are what the graph was given, caches as they were before."""
        own = self._start(inputs)  # what the compiled graph has, or should have made of what it has
        pure = dict(own)  # what the definition makes by itself
        found: dict[Node, OpError] = {}
        for node in self.nodes:
            if node.op == "placeholder" or op_name(node) == "top_tokens":  # equals may be in any order there
                continue
            expected = _call(node, own)
            pure[node] = _call(node, pure)
            if not isinstance(expected, Tensor):
                own[node] = expected
                continue
            value = find(node, expected)
            own[node] = expected if value is None else value
            found[node] = _compared(node, expected, value, pure[node])
        return found

    def _start(self, inputs: list[Tensor]) -> dict[Node, Any]:
        given = dict(zip(self.user_inputs, inputs, strict=True))
        start = {}
        for node in self.nodes:
            if node.op == "placeholder":
                start[node] = given[node.name] if node.name in given else self.parameters[self.names[node.name]]
        return start


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    arguments = map_arg(node.args, values.__getitem__)
    settings = {key: value for key, value in map_arg(dict(node.kwargs), values.__getitem__).items() if key != "device"}
    if "_assert_tensor_metadata" in str(node.target):
        return None
    target: Any = node.target
    return target(*arguments, **settings)


def _compared(node: Node, expected: Tensor, value: Tensor | None, pure: Any) -> OpError:
    output = node.args[1] if _is_item(node) else None
    what = WRITTEN.get(output, "") if isinstance(output, int) else ""
    a = expected.float().numpy()
    b = None if value is None else value.float().numpy()
    return OpError(
        module=module_of(node),
        op=op_name(node),
        shape=tuple(expected.shape),
        error=None if b is None else relative_error(a, b),
        drift=None if b is None else relative_error(pure.float().numpy(), b),
        what=what,
        note=_shifted(a, b) if what and b is not None else "",
    )


def _shifted(expected: np.ndarray, found: np.ndarray) -> str:
    """Whether rows of a cache [B, K, S, D] lie some rows off."""
    if relative_error(expected, found) < 1e-3:
        return ""
    changed = np.flatnonzero(np.abs(expected - found).max(axis=(0, 1, 3)) > 1e-6)
    for rows in (1, -1, 2, -2):
        moved = np.roll(found, -rows, axis=2)
        kept = changed[(changed + rows >= 0) & (changed + rows < found.shape[2])][:-1]
        if len(kept) and relative_error(expected[:, :, kept], moved[:, :, kept]) < 1e-3:
            return f"rows lie {abs(rows)} {'late' if rows > 0 else 'early'}"
    return ""


def module_of(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {"": ("graph", None)}).values())
    return stack[-1][0] or "graph"


def op_name(node: Node) -> str:
    source = node.args[0] if _is_item(node) else node
    return str(source.target if isinstance(source, Node) else node.target).removesuffix(".default").removeprefix("staticvl.")


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
