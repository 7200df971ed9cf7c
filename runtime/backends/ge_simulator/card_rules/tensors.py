"""What is known of every tensor of a GE graph without running it: dtype, shape, and the values of constants.

torchair notes dtypes for almost every output. Its shapes are those of the traced program, where an operator's output may be
noted as the view that was taken of it; so shapes are worked out from inputs here, and torchair's serve only where no formula is
known. What depends on values of inputs (lengths, indices) is left open: None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ge_graph import ATTRIBUTE_DTYPES, INPUT_TYPES, Constant, GeGraph, Node, Source
from . import shapes

_FEW = 4096  # values of a constant that are read: axes, sizes, bounds
# Outputs whose dtype is not that of the first input, where torchair noted none.
_OWN_DTYPES = {"ArgMaxWithValue": ("int32", ""), "TopKV2": ("", "int32"), "Shape": ("int32",)}
# Operators that give their first input another shape at most.
VIEWS = ("Reshape", "Unsqueeze", "Squeeze", "ExpandDims", "FlattenV2", "Identity")
# What may lie between a weight as it is stored and as a product reads it.
PREPARING = (
    "Transpose", "Cast", "StridedSliceV2", "StridedSlice", "Slice", "PadV3", "Pad", "ConcatV2", "TransQuantParamV2",
    "Reciprocal", "TensorMove",
)  # fmt: skip
WEIGHT_INPUTS = {
    "MatMul": ("x2", "bias"),
    "MatMulV2": ("x2", "bias"),
    "Conv2D": ("filter", "bias"),
    "WeightQuantBatchMatmulV2": ("weight", "antiquant_scale", "antiquant_offset", "bias"),
    "QuantBatchMatmulV3": ("x2", "scale", "bias"),
    "MatmulAllReduce": ("x2", "bias", "antiquant_scale", "dequant_scale"),
    "RmsNorm": ("gamma",),
    "AddRmsNorm": ("gamma",),
    "AddRmsNormDynamicQuant": ("gamma",),
    "LayerNormV4": ("gamma", "beta"),
    "FusedInferAttentionScore": ("key_antiquant_scale", "value_antiquant_scale"),
    "QuantUpdateScatter": ("quant_scales",),
    "AscendQuantV2": ("scale",),
    "Quantize": ("scales",),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor; `values`: of a small constant."""

    dtype: str | None
    shape: tuple[int, ...] | None
    values: tuple[Any, ...] | None = None

    @property
    def constant(self) -> bool:
        return self.values is not None

    def __str__(self) -> str:
        return f"{self.dtype or 'unknown dtype'} {'?' if self.shape is None else list(self.shape)}"


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as rules see it."""

    node: Node
    graph: GraphView = field(repr=False)

    def source(self, name: str) -> Source | None:
        """Where an input comes from; None where it is not fed."""
        for given, source in zip(self.node.input_names, self.node.inputs, strict=True):
            if given == name:
                return source
        return None

    def input(self, name: str) -> TensorInfo | None:
        """None where it is not fed."""
        source = self.source(name)
        return None if source is None else self.graph.tensor(source)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where the input is not fed or its shape is open."""
        tensor = self.input(name)
        return None if tensor is None else tensor.shape

    def dtype(self, name: str) -> str | None:
        tensor = self.input(name)
        return None if tensor is None else tensor.dtype

    def output(self, index: int = 0) -> TensorInfo:
        return self.graph.tensor(Source(self.node.name, index))

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.node.attributes.get(name, default)

    def dtype_attribute(self, name: str) -> str | None:
        """The dtype that an attribute of a number or a name means."""
        value = self.node.attributes.get(name)
        return value if isinstance(value, str) else ATTRIBUTE_DTYPES.get(value) if isinstance(value, int) else None

    def producer(self, name: str) -> NodeView | None:
        """The node that made an input."""
        source = self.source(name)
        return None if source is None else self.graph.view(source.producer)

    @property
    def fed(self) -> Iterator[tuple[str, Source]]:
        """Inputs that are fed, with where they come from."""
        for name, source in zip(self.node.input_names, self.node.inputs, strict=True):
            if source is not None:
                yield name, source

    @property
    def readers(self) -> list[Node]:
        return self.graph.readers(self.node.name)


class GraphView:
    """A graph with what is known of its tensors. `weights`: graph inputs that products and norms read as weights, scales or
    biases; `fixed`: nodes whose outputs are the same in every run, because they are made of weights and constants alone;
    `constant`: those of them that are made of constants alone, which the graph engine folds."""

    def __init__(self, graph: GeGraph) -> None:
        self.graph = graph
        self._nodes = {node.name: node for node in graph.nodes}
        self._tensors: dict[Source, TensorInfo] = {}
        self._readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            self._tensors |= {Source(node.name, i): each for i, each in enumerate(self._outputs(node))}
            for producer in dict.fromkeys(source.producer for source in node.inputs if source):
                self._readers.setdefault(producer, []).append(node)
        self.weights = frozenset(self._weights())
        self.constant = self._made_of(frozenset())
        self.fixed = self._made_of(self.weights)

    def __iter__(self) -> Iterator[NodeView]:
        return (NodeView(node, self) for node in self.graph.nodes)

    def tensor(self, source: Source) -> TensorInfo:
        return self._tensors[source]

    def view(self, name: str) -> NodeView:
        return NodeView(self._nodes[name], self)

    def readers(self, name: str) -> list[Node]:
        return self._readers.get(name, [])

    def origin_of(self, source: Source, *types: str) -> NodeView:
        """The node that made a tensor, or the one before it that is none of these types; the first input is followed."""
        node = self._nodes[source.producer]
        while node.type in types and node.inputs and node.inputs[0] is not None:
            node = self._nodes[node.inputs[0].producer]
        return NodeView(node, self)

    def _weights(self) -> Iterator[str]:
        for node in self.graph.nodes:
            for name, source in zip(node.input_names, node.inputs, strict=True):
                if source and name in WEIGHT_INPUTS.get(node.type, ()):
                    origin = self.origin_of(source, *VIEWS, *PREPARING).node
                    if origin.type in INPUT_TYPES:
                        yield origin.name

    def _made_of(self, inputs: frozenset[str]) -> frozenset[str]:
        """Nodes that depend on these graph inputs and on constants alone."""
        constant: set[str] = set(inputs)
        for node in self.graph.nodes:  # each after those that it reads
            made = bool(node.inputs) and all(source is None or source.producer in constant for source in node.inputs)
            if node.type == "Const" or (made and node.type not in INPUT_TYPES):
                constant.add(node.name)
        return frozenset(constant)

    def _outputs(self, node: Node) -> Iterator[TensorInfo]:
        if node.type == "Const":
            value: Constant = node.attributes["value"]
            few = math.prod(value.shape) <= _FEW
            yield TensorInfo(value.dtype, value.shape, tuple(value.array().reshape(-1).tolist()) if few else None)
            return
        inputs = {name: self._tensors[source] for name, source in zip(node.input_names, node.inputs, strict=True) if source}
        worked_out = shapes.of(node, inputs)
        for i, descriptor in enumerate(node.outputs):
            shape = None if worked_out is None or i >= len(worked_out) else worked_out[i]
            yield TensorInfo(descriptor.dtype or _dtype(node, inputs, i), descriptor.shape if shape is None else shape)


def _dtype(node: Node, inputs: Mapping[str, TensorInfo], index: int) -> str | None:
    if node.type == "Cast":
        return ATTRIBUTE_DTYPES.get(node.attributes["dst_type"])
    own = _OWN_DTYPES.get(node.type, ())
    if index < len(own) and own[index]:
        return own[index]
    first = next(iter(inputs.values()), None)
    return None if first is None else first.dtype
