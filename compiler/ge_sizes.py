"""Sizes of the tensors of a GE graph, as far as they are known without running it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..runtime.backends.ge_simulator.card_rules.tensors import GraphView
from ..runtime.backends.ge_simulator.ge_graph import GeGraph, Node, Source

WIDTHS = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint64": 8, "int32": 4, "uint32": 4, "int16": 2,
    "uint16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """Dtype and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * WIDTHS[self.dtype]


class Sizes:
    """The size of every tensor of a graph; None for one that is not known."""

    def __init__(self, graph: GeGraph) -> None:
        self.view = GraphView(graph)

    def of(self, source: Source | None) -> Size | None:
        if source is None:
            return None
        tensor = self.view.tensor(source)
        return Size(tensor.dtype, tensor.shape) if tensor.dtype in WIDTHS and tensor.shape is not None else None

    def input(self, node: Node, *names: str) -> Size | None:
        """The size of the first input of these names that the node has; of its first input without names."""
        if not names:
            return self.of(node.inputs[0]) if node.inputs else None
        return next(
            (self.of(source) for name, source in zip(node.input_names, node.inputs, strict=True) if name in names), None
        )

    def inputs(self, node: Node) -> list[Size | None]:
        """Those of all inputs that are fed, in order."""
        return [self.of(source) for source in node.inputs if source]

    def outputs(self, node: Node) -> list[Size | None]:
        return [self.of(Source(node.name, place)) for place in range(len(node.outputs))]

    def order(self, node: Node) -> list[int] | None:
        """The axes of a Transpose. None: they are unknown, or the shape is."""
        size, axes = self.input(node), node.inputs[1]
        values = self.view.tensor(axes).values if axes else None
        return [int(axis) for axis in values] if size and values and len(values) == len(size.shape) else None
