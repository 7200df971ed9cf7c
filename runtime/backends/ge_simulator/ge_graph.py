"""GE graphs that torchair makes, as small frozen objects.

A graph arrives as a serialised ModelDef (torchair._ge_concrete_graph.ge_ir_pb2) with one GraphDef. Its conventions, read from
torchair/ge/_ge_graph.py:

    op.input      "producer:index" per input; "" for an optional input that is not fed; "producer:-1" for a control edge
    op.input_desc one descriptor per input that is not a control edge, named as the operator definition names it
    dtypes        descriptors count in the enumeration of the protobuf, attributes in that of torchair.ge.DataType
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

INPUT_TYPES = ("Data", "RefData")
OUTPUT_TYPE = "NetOutput"

# torchair.ge.DataType, which attributes use. 28 stands for "not set".
ATTRIBUTE_DTYPES = {
    0: "float32", 1: "float16", 2: "int8", 3: "int32", 4: "uint8", 6: "int16", 7: "uint16", 8: "uint32", 9: "int64",
    10: "uint64", 11: "float64", 12: "bool", 27: "bfloat16",
}  # fmt: skip

# DataType of the protobuf, which descriptors use.
PROTO_DTYPES = {
    1: "float32", 2: "float16", 3: "int8", 4: "uint8", 5: "int16", 6: "uint16", 7: "int32", 8: "int64", 9: "uint32",
    10: "uint64", 11: "bool", 12: "float64", 27: "bfloat16",
}  # fmt: skip

_LISTS = {0: "s", 2: "i", 3: "f", 4: "b", 10: "dt"}  # ListValue.val_type -> field


class GeGraphError(ValueError):
    """A graph that is malformed, or holds what its reader does not support."""


class Source(NamedTuple):
    """One output of another node."""

    producer: str
    output: int


@dataclass(frozen=True, slots=True)
class TensorDescriptor:
    """The descriptor of a tensor: its dtype by torch's name, and its shape; None where the graph leaves them open.

    torchair writes dtype and shape for tensors of the traced program alone.
    """

    name: str
    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Constant:
    """The value of a Const: little-endian, contiguous."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    def array(self) -> np.ndarray:
        """The value; bfloat16, which numpy lacks, as float32."""
        if self.dtype == "bfloat16":
            bits = np.frombuffer(self.data, np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(self.shape)
        return np.frombuffer(self.data, np.dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator: `inputs` in the order of its definition, named by `input_names`, None where an optional one is not fed."""

    type: str
    name: str
    input_names: tuple[str, ...]
    inputs: tuple[Source | None, ...]
    attributes: Mapping[str, Any]
    outputs: tuple[TensorDescriptor, ...]
    after: tuple[str, ...] = ()  # nodes that have to run first, though nothing of theirs is read

    @property
    def producers(self) -> tuple[str, ...]:
        """Every node that has to run before this one."""
        return (*(source.producer for source in self.inputs if source), *self.after)


@dataclass(frozen=True, slots=True)
class GeGraph:
    """A graph: nodes in an order in which they can run, inputs by index, and the inputs of NetOutput in order."""

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Source, ...]

    def node(self, name: str) -> Node:
        """Raises KeyError where there is none of that name."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def types(self) -> dict[str, int]:
        """How many nodes there are of each type, most frequent first."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.type] = counts.get(node.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def constants(self) -> dict[str, Constant]:
        """The value of every Const, by the name of its node."""
        return {node.name: node.attributes["value"] for node in self.nodes if node.type == "Const"}

    def readers(self, source: Source) -> list[Node]:
        """The nodes that read this output."""
        return [node for node in self.nodes if source in node.inputs]


def parse(serialized: bytes) -> GeGraph:
    """A serialised ModelDef -> its graph.

    Raises GeGraphError for bytes that are no ModelDef, for another number of graphs than one, inputs whose indices do not
    count up from 0, inputs without a producer, and cycles.
    """
    graph = _graph_def(serialized)
    nodes = _sorted_nodes([_node(op) for op in graph.op])
    inputs = sorted((node for node in nodes if node.type in INPUT_TYPES), key=lambda node: node.attributes["index"])
    if [node.attributes["index"] for node in inputs] != list(range(len(inputs))):
        indices = [node.attributes["index"] for node in inputs]
        raise GeGraphError(f"the graph's inputs have the indices {indices}; expected 0 to {len(inputs) - 1}, each once")
    ends = [node for node in nodes if node.type == OUTPUT_TYPE]
    if len(ends) != 1:
        raise GeGraphError(f"the graph has {len(ends)} nodes of type {OUTPUT_TYPE}; expected one")
    return GeGraph(graph.name, nodes, tuple(inputs), tuple(source for source in ends[0].inputs if source))


def _graph_def(serialized: bytes) -> Any:
    if "torchair" not in sys.modules:
        from ..ascend import torchair_host

        torchair_host.load()
    from google.protobuf.message import DecodeError
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef  # pyright: ignore[reportMissingImports]

    model = ModelDef()
    try:
        model.ParseFromString(serialized)
    except DecodeError as error:
        raise GeGraphError("these bytes are no serialised GE model") from error
    if len(model.graph) != 1:
        raise GeGraphError(f"the GE model holds {len(model.graph)} graphs; expected one")
    return model.graph[0]


def _node(op: Any) -> Node:
    inputs = [name for name in op.input if not name.endswith(":-1")]
    if len(inputs) != len(op.input_desc) and op.type not in INPUT_TYPES:
        raise GeGraphError(f"{op.type} {op.name} has {len(inputs)} inputs and {len(op.input_desc)} descriptors of inputs")
    return Node(
        type=op.type,
        name=op.name,
        input_names=tuple(descriptor.name for descriptor in op.input_desc) if inputs else (),
        inputs=tuple(_source(name) if name else None for name in inputs),
        attributes={name: _attribute(value) for name, value in sorted(op.attr.items())},
        outputs=tuple(_descriptor(descriptor, op.type) for descriptor in op.output_desc),
        after=tuple(name.removesuffix(":-1") for name in op.input if name.endswith(":-1")),
    )


def _source(name: str) -> Source:
    producer, _, index = name.rpartition(":")
    return Source(producer, int(index))


def _descriptor(descriptor: Any, node_type: str) -> TensorDescriptor:
    """torchair marks a descriptor that it filled from the traced program by `_meta`; in others the dtype means nothing."""
    dtype = PROTO_DTYPES.get(descriptor.dtype)
    if node_type in INPUT_TYPES or node_type == "Const":
        return TensorDescriptor(descriptor.name, dtype, tuple(descriptor.shape.dim))
    if "_meta" not in descriptor.attr:
        return TensorDescriptor(descriptor.name, None, None)
    return TensorDescriptor(descriptor.name, dtype, _meta_shape(descriptor.attr["_meta"].s.decode()))


def _meta_shape(text: str) -> tuple[int, ...] | None:
    """The shape in `Tensor(dtype=torch.float16, shape=torch.Size([1, 8])`, where it is all numbers."""
    _, marker, rest = text.partition("torch.Size([")
    sizes = [size for size in rest.partition("]")[0].split(",") if size.strip()]
    if not marker or not all(size.strip().isdigit() for size in sizes):
        return None
    return tuple(int(size) for size in sizes)


def _attribute(value: Any) -> Any:
    kind = value.WhichOneof("value")
    readers = {
        "s": lambda: _text(value.s),
        "dt": lambda: ATTRIBUTE_DTYPES.get(value.dt, f"GE data type {value.dt}"),
        "t": lambda: _constant(value.t),
        "list": lambda: _list(value.list),
        "list_list_int": lambda: [list(inner.list_i) for inner in value.list_list_int.list_list_i],
    }
    if kind in ("i", "f", "b"):
        return getattr(value, kind)
    return readers[kind]() if kind in readers else f"a value of kind {kind}"


def _list(values: Any) -> list[Any]:
    """The values of a list attribute; some writers leave out their type."""
    name = _LISTS.get(values.val_type) or "i"
    items = getattr(values, name) or next((getattr(values, other) for other in _LISTS.values() if getattr(values, other)), [])
    return [_text(each) if isinstance(each, bytes) else each for each in items]


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _constant(tensor: Any) -> Constant:
    dtype = PROTO_DTYPES.get(tensor.desc.dtype)
    if dtype is None:
        raise GeGraphError(f"a Const has the data type {tensor.desc.dtype} of the protobuf, which is not supported")
    shape = tuple(tensor.desc.shape.dim)
    size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    if len(tensor.data) != int(np.prod(shape, dtype=np.int64)) * size:
        raise GeGraphError(f"a Const of {dtype} {list(shape)} has {len(tensor.data)} bytes")
    return Constant(dtype, shape, tensor.data)


def _sorted_nodes(nodes: list[Node]) -> tuple[Node, ...]:
    """The nodes, each after those that it needs, otherwise in their given order."""
    place = {node.name: i for i, node in enumerate(nodes)}
    if len(place) != len(nodes):
        raise GeGraphError("two nodes of the graph have one name")
    _check_producers(nodes, place)
    waiting = [len(set(node.producers)) for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for producer in set(node.producers):
            readers[place[producer]].append(i)
    ready = [i for i, count in enumerate(waiting) if not count]
    ordered = []
    while ready:
        i = heapq.heappop(ready)
        ordered.append(nodes[i])
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(ordered) != len(nodes):
        blocked = next(node for node, count in zip(nodes, waiting, strict=True) if count)
        raise GeGraphError(f"{blocked.type} {blocked.name} depends on its own output: the graph has a cycle")
    return tuple(ordered)


def _check_producers(nodes: Iterable[Node], names: Mapping[str, int]) -> None:
    for node in nodes:
        for producer in node.producers:
            if producer not in names:
                raise GeGraphError(f"{node.type} {node.name} takes an output of {producer}, which is not in the graph")
