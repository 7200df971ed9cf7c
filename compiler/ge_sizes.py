"""Sizes of the tensors of a GE graph.

torchair writes shape and dtype of tensors of the traced program alone. What its converters put between them is inferred here,
for the operators that they use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from ..runtime.backends.ge_simulator.ge_graph import ATTRIBUTE_DTYPES, Constant, GeGraph, Node, Source

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
    """The size of every tensor of a graph that is stated or can be inferred, and the values of its constants."""

    def __init__(self, graph: GeGraph) -> None:
        self.constants: Mapping[str, Constant] = graph.constants()
        self._known: dict[Source, Size] = {}
        for node in graph.nodes:
            self._note(node)

    def of(self, source: Source | None) -> Size | None:
        return self._known.get(source) if source else None

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

    def values(self, node: Node, place: int) -> list[int] | None:
        """The values of an input that is a constant."""
        source = node.inputs[place] if place < len(node.inputs) else None
        constant = self.constants.get(source.producer) if source else None
        return None if constant is None else cast("list[int]", np.ravel(constant.array()).tolist())

    def order(self, node: Node) -> list[int] | None:
        """The axes of a Transpose. None: they are unknown, or the shape is: torchair may note that of a view."""
        size, order = self.input(node), self.values(node, 1)
        return order if size and order and len(order) == len(size.shape) else None

    def _note(self, node: Node) -> None:
        for place, output in enumerate(node.outputs):
            if output.dtype in WIDTHS and output.shape is not None:
                self._known[Source(node.name, place)] = Size(output.dtype, output.shape)
        for place, infer in enumerate(_INFERRED.get(node.type, ())):
            output = Source(node.name, place)
            if output not in self._known and (size := infer(node, self)):
                self._known[output] = size


def _same(node: Node, sizes: Sizes) -> Size | None:
    return sizes.input(node)


def _broadcast(node: Node, sizes: Sizes) -> Size | None:
    given = [size for size in sizes.inputs(node) if size]
    if len(given) != len(node.inputs):
        return None
    return Size(given[0].dtype, np.broadcast_shapes(*(size.shape for size in given)))


def _cast(node: Node, sizes: Sizes) -> Size | None:
    size, dtype = sizes.input(node), ATTRIBUTE_DTYPES.get(node.attributes["dst_type"])
    return Size(dtype, size.shape) if size and dtype else None


def _reshape(node: Node, sizes: Sizes) -> Size | None:
    size, shape = sizes.input(node), sizes.values(node, 1)
    if size is None or shape is None:
        return None
    kept = [size.shape[place] if each == 0 else each for place, each in enumerate(shape)]
    rest = size.elements // max(1, math.prod(each for each in kept if each != -1))
    return Size(size.dtype, tuple(rest if each == -1 else each for each in kept))


def _transpose(node: Node, sizes: Sizes) -> Size | None:
    size, order = sizes.input(node), sizes.order(node)
    return Size(size.dtype, tuple(size.shape[axis] for axis in order)) if size and order else None


def _unsqueeze(node: Node, sizes: Sizes) -> Size | None:
    if (size := sizes.input(node)) is None:
        return None
    shape = list(size.shape)
    rank = len(shape) + len(node.attributes["axes"])
    for axis in sorted(each % rank for each in node.attributes["axes"]):
        shape.insert(axis, 1)
    return Size(size.dtype, tuple(shape))


def _range(node: Node, sizes: Sizes) -> Size | None:
    start, values = sizes.input(node), [sizes.values(node, place) for place in range(3)]
    if start is None or not all(values):
        return None
    first, limit, step = (each[0] for each in values if each)
    return Size(start.dtype, (max(0, math.ceil((limit - first) / step)),))


def _unknown(_node: Node, _sizes: Sizes) -> None:
    return None


def _indices(values: int) -> Callable[[Node, Sizes], Size | None]:
    """Of the largest values, which are the output at `values`."""

    def infer(node: Node, sizes: Sizes) -> Size | None:
        size = sizes.of(Source(node.name, values))
        return Size("int32", size.shape) if size else None

    return infer


# How outputs are inferred, in order.
_INFERRED: dict[str, tuple[Callable[[Node, Sizes], Size | None], ...]] = {
    **dict.fromkeys(("Identity", "Round", "Reciprocal", "ClipByValueV2", "Exp", "Scatter"), (_same,)),
    **dict.fromkeys(("Add", "Sub", "Mul", "RealDiv"), (_broadcast,)),
    "Cast": (_cast,),
    "TensorMove": (_same,),
    "Reshape": (_reshape,),
    "Transpose": (_transpose,),
    "Unsqueeze": (_unsqueeze,),
    "Range": (_range,),
    "ArgMaxWithValue": (_indices(1),),
    "TopKV2": (_unknown, _indices(0)),
}
