"""Small GE graphs as objects, for rules that look at one node: no torchair needed to make them, and its form to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.ge_simulator.ge_graph import (
    ATTRIBUTE_DTYPES,
    PROTO_DTYPES,
    Constant,
    GeGraph,
    Node,
    Source,
    TensorDescriptor,
)

from .ge_graphs import write_value

Tensor = tuple[str, tuple[int, ...]]  # dtype and shape
DTYPE_NUMBERS = {name: number for number, name in ATTRIBUTE_DTYPES.items()}


class Graph:
    """A graph under construction: inputs in order, constants, and nodes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def input(self, dtype: str, *shape: int) -> Source:
        index = sum(node.type == "Data" for node in self.nodes)
        return self._add("Data", {}, {"index": index}, [(dtype, shape)])

    def const(self, *values: int, dtype: str = "int64") -> Source:
        data = np.array(values, dtype).tobytes()
        value = Constant(dtype, (len(values),), data)
        return self._add("Const", {}, {"value": value}, [(dtype, (len(values),))])

    def node(
        self, kind: str, inputs: Mapping[str, Source | None], outputs: Sequence[Tensor | None], **attributes: Any
    ) -> Source:
        """The first output of a new node; an output that is None is one of which torchair noted nothing."""
        return self._add(kind, inputs, attributes, outputs)

    def _add(
        self, kind: str, inputs: Mapping[str, Source | None], attributes: dict[str, Any], outputs: Sequence[Tensor | None]
    ) -> Source:
        name = f"{kind}_{len(self.nodes)}"
        described = tuple(TensorDescriptor(f"y{i}", *(each or (None, None))) for i, each in enumerate(outputs))
        self.nodes.append(Node(kind, name, tuple(inputs), tuple(inputs.values()), attributes, described))
        return Source(name, 0)

    def made(self, *outputs: Source) -> GeGraph:
        """The whole graph; without outputs, the last node's first."""
        ends = outputs or (Source(self.nodes[-1].name, 0),)
        end = Node("NetOutput", "NetOutput", tuple(f"input{i}" for i in range(len(ends))), ends, {}, ())
        inputs = tuple(node for node in self.nodes if node.type == "Data")
        return GeGraph("graph", (*self.nodes, end), inputs, ends)


def serialized(graph: GeGraph) -> bytes:
    """The bytes that torchair would have made of it."""
    torchair_host.load()
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    definition = model.graph.add(name=graph.name)
    for node in graph.nodes:
        op = definition.op.add(name=node.name, type=node.type)
        for name, source in zip(node.input_names, node.inputs, strict=True):
            op.input.append(f"{source.producer}:{source.output}" if source else "")
            op.input_desc.add(name=name)
        for descriptor in node.outputs:
            _describe(op.output_desc.add(name=descriptor.name), descriptor.dtype, descriptor.shape)
        for name, value in node.attributes.items():
            _set(op.attr[name], value)
    return model.SerializeToString()


def _describe(descriptor: Any, dtype: str | None, shape: tuple[int, ...] | None) -> None:
    if dtype is None or shape is None:
        return
    descriptor.dtype = next(number for number, name in PROTO_DTYPES.items() if name == dtype)
    descriptor.shape.dim.extend(shape)
    descriptor.attr["_meta"].s = f"Tensor(dtype=torch.{dtype}, shape=torch.Size({list(shape)})".encode()


def _set(attribute: Any, value: Any) -> None:
    if isinstance(value, Constant):
        _describe(attribute.t.desc, value.dtype, value.shape)
        attribute.t.data = value.data
    elif isinstance(value, list):
        attribute.list.val_type = 2
        attribute.list.i.extend(value)
    else:
        write_value(attribute, value)
