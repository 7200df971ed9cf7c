"""The error of every operator: the values of a compiled graph against those that each operator's definition computes.

Every definition gets the compiled graph's values for its inputs, so an error is the operator's own: errors do not
accumulate, and the first operator that is wrong is at fault.
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

from ...compiler.tracing import Trace, module_path
from .metrics import relative_error

# (traced node, expected value) -> the compiled graph's value of it, or None
ValueFinder = Callable[[Node, Tensor], Tensor | None]
WRITTEN = {1: "keys written", 2: "values written"}  # outputs of cached attention


@dataclass(frozen=True, slots=True)
class OpError:
    """One operator of a graph. `error` is None where the compiled graph has no such value."""

    module: str  # e.g. text.layers.3.attn
    op: str
    shape: tuple[int, ...]
    error: float | None
    drift: float | None  # error against the definition's own run from the graph's inputs on
    output: str = ""  # which output, where there are several
    note: str = ""
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.module} {self.op}" + (f" ({self.output})" if self.output else "")


class OperatorComparison:
    """The comparison of all operators of one traced graph with its parameters."""

    def __init__(self, program: Trace, parameters: Mapping[str, Tensor]) -> None:
        self.nodes = [node for node in program.graph.nodes if node.op in ("placeholder", "call_function")]
        self.program = program
        self.parameters = parameters

    @torch.inference_mode()
    def run(self, inputs: list[Tensor], find: ValueFinder) -> dict[Node, OpError]:
        """Every operator's error, in order. `inputs`: those of the graph, caches as they were before."""
        values = self._start(inputs)  # of the compiled graph; where it has none, expected from its other values
        pure = dict(values)  # of the definition's own run
        errors: dict[Node, OpError] = {}
        for node in self.nodes:
            if node.op == "placeholder" or op_name(node) == "top_tokens":  # equals may be in any order there
                continue
            expected = _call(node, values)
            pure[node] = _call(node, pure)
            if not isinstance(expected, Tensor):
                values[node] = expected
                continue
            value = find(node, expected)
            values[node] = expected if value is None else value
            errors[node] = _compared(node, expected, value, pure[node])
        return errors

    def _start(self, inputs: list[Tensor]) -> dict[Node, Any]:
        parameters = {node: self.parameters[name] for node, name in self.program.parameters.items()}
        return parameters | dict(zip(self.program.inputs, inputs, strict=True))


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    arguments = map_arg(node.args, values.__getitem__)
    settings = {key: value for key, value in map_arg(dict(node.kwargs), values.__getitem__).items() if key != "device"}
    target: Any = node.target
    return target(*arguments, **settings)


def _compared(node: Node, expected: Tensor, value: Tensor | None, pure: Any) -> OpError:
    index = node.args[1] if _is_item(node) else None
    output = WRITTEN.get(index, "") if isinstance(index, int) else ""
    a = expected.float().numpy()
    b = None if value is None else value.float().numpy()
    return OpError(
        module=module_path(node),
        op=op_name(node),
        shape=tuple(expected.shape),
        error=None if b is None else relative_error(a, b),
        drift=None if b is None else relative_error(pure.float().numpy(), b),
        output=output,
        note=_shifted(a, b) if output and b is not None else "",
    )


def _shifted(expected: np.ndarray, value: np.ndarray) -> str:
    """A note where rows of a cache [B, K, S, D] are some rows too early or late."""
    if relative_error(expected, value) < 1e-3:
        return ""
    changed = np.flatnonzero(np.abs(expected - value).max(axis=(0, 1, 3)) > 1e-6)
    for rows in (1, -1, 2, -2):
        moved = np.roll(value, -rows, axis=2)
        inside = changed[(changed + rows >= 0) & (changed + rows < value.shape[2])][:-1]
        if len(inside) and relative_error(expected[:, :, inside], moved[:, :, inside]) < 1e-3:
            return f"rows lie {abs(rows)} {'late' if rows > 0 else 'early'}"
    return ""


def op_name(node: Node) -> str:
    source = node.args[0] if _is_item(node) else node
    return str(source.target if isinstance(source, Node) else node.target).removesuffix(".default").removeprefix("staticvl.")


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
