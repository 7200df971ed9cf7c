"""A simulator of the GE graphs that torchair makes, with torch on a CPU: it shows anywhere what an NPU would compute.

The default mode keeps the graph's dtypes: a value is stored in its dtype after every operator, and an operator that adds up
many products (matrix products, convolution, norms, softmax, attention, reductions) computes in float32 and rounds once at its
end, as the cube and vector units do. With `wide` every float16 or bfloat16 is upcast to float32, which separates what a
graph computes from how it rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Group
from . import card_rules, ge_ops
from .ge_graph import INPUT_TYPES, OUTPUT_TYPE, Constant, GeGraph, GeGraphError, Node, Source, parse
from .ge_ops.registry import HALVES, BoundOp

# Errors of torch for operands that it cannot compute with; other errors, such as those of a group, are passed on.
_TORCH_ERRORS = (RuntimeError, IndexError, TypeError, NotImplementedError, ZeroDivisionError)

OnOutputs = Callable[[Node, Sequence[Tensor]], object]


@dataclass(frozen=True, slots=True)
class BoundNode:
    """A node bound to its operator; `unused_after`: values that no later node reads."""

    node: Node
    call: BoundOp
    unused_after: tuple[Source, ...]


class Simulator:
    """One graph, ready to run; an executor for `torchair_host.TorchairHost.running_on`.

    Raises GeGraphError for a graph with an operator, an input or an attribute that is not simulated, or that `card` refuses
    (card_rules/; None: none does), and for a graph in which another node reads an input that is written in place, since their
    order is open. A graph of one rank of several needs their `group`, and raises ArtifactError when it runs without one.
    `on_outputs` is called with every node that has run, and its outputs, which later nodes may write over.
    """

    def __init__(
        self,
        serialized: bytes,
        *,
        wide: bool = False,
        group: Group | None = None,
        on_outputs: OnOutputs | None = None,
        card: str | None = card_rules.CARDS[0],
    ) -> None:
        self.graph = parse(serialized)
        self.wide, self.group, self.on_outputs = wide, group, on_outputs
        self._constants = {node.name: self._constant(node.attributes["value"]) for node in self.graph.nodes if _is_const(node)}
        self._written = _written_inputs(self.graph)
        self._bound_nodes = self._bind_nodes()
        if card is not None:
            card_rules.refuse(self.graph, card)

    def __call__(self, inputs: Sequence[Tensor], assigned: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Outputs, in order; the one at i is written into assigned[i], if that is a tensor, which is returned.

        Inputs are checked for number, shape and dtype (with `wide`, a float16 or bfloat16 may come as a float32); operators
        that write in place write into the caller's tensors. Raises GeGraphError, naming the input, output or node.
        """
        if assigned and len(assigned) != len(self.graph.outputs):
            raise GeGraphError(f"{len(assigned)} tensors are assigned to {len(self.graph.outputs)} outputs")
        self._check_inputs(inputs)
        # Inputs that are written in place are upcast first; weights one by one, when an operator reads them.
        operands = [self._upcast(x) if i in self._written else x for i, x in enumerate(inputs)]
        values = {Source(node.name, 0): x for node, x in zip(self.graph.inputs, operands, strict=True)}
        values |= {Source(name, 0): value for name, value in self._constants.items()}
        with torch.no_grad():
            for bound_node in self._bound_nodes:
                self._run_node(bound_node, values)
            for index in self._written:  # an upcast copy of an input was written: the caller's tensor gets its values
                _copied(inputs[index], operands[index])
            return self._outputs(values, inputs, assigned or [None] * len(self.graph.outputs))

    def _constant(self, value: Constant) -> Tensor:
        dtype = getattr(torch, value.dtype)
        if not value.data:  # which frombuffer refuses
            return self._upcast(torch.empty(value.shape, dtype=dtype))
        return self._upcast(torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape))

    def _upcast(self, value: Tensor) -> Tensor:
        return value.float() if self.wide and value.dtype in HALVES else value

    def _bind_nodes(self) -> list[BoundNode]:
        last_reader: dict[Source, Node] = {}
        for node in self.graph.nodes:
            last_reader.update({source: node for source in node.inputs if source})
        unused: dict[str, list[Source]] = {}
        for source, node in last_reader.items():
            unused.setdefault(node.name, []).append(source)
        nodes = [node for node in self.graph.nodes if node.type not in (*INPUT_TYPES, OUTPUT_TYPE, "Const")]
        return [BoundNode(node, _bind(node, self.wide, self.group), tuple(unused.get(node.name, ()))) for node in nodes]

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self.graph.inputs):
            raise GeGraphError(f"{len(inputs)} inputs were given to a graph of {len(self.graph.inputs)}")
        for tensor, node in zip(inputs, self.graph.inputs, strict=True):
            self._check_input(tensor, node)

    def _check_input(self, tensor: Tensor, node: Node) -> None:
        descriptor = node.outputs[0]
        name = f"input {node.attributes['index']} ({node.name})"
        expected = getattr(torch, descriptor.dtype or "float32")
        allowed = (expected, torch.float32) if self.wide and expected in HALVES else (expected,)
        if tensor.dtype not in allowed:
            raise GeGraphError(f"{name} is {tensor.dtype}; expected {expected}")
        if descriptor.shape is not None and min(descriptor.shape, default=0) >= 0 and tuple(tensor.shape) != descriptor.shape:
            raise GeGraphError(f"{name} has the shape {list(tensor.shape)}; expected {list(descriptor.shape)}")

    def _run_node(self, bound_node: BoundNode, values: dict[Source, Tensor]) -> None:
        node = bound_node.node
        try:
            outputs = bound_node.call([None if source is None else self._upcast(values[source]) for source in node.inputs])
            self._check_outputs(node, outputs)
            if self.on_outputs is not None:
                self.on_outputs(node, outputs)
        except GeGraphError as error:
            raise GeGraphError(f"{node.type} {node.name}: {error}") from error
        except Exception as error:
            if type(error) not in _TORCH_ERRORS:
                raise
            raise GeGraphError(f"{node.type} {node.name}: {str(error).splitlines()[0]}") from error
        values.update({Source(node.name, i): output for i, output in enumerate(outputs)})
        for source in bound_node.unused_after:
            values.pop(source, None)

    def _check_outputs(self, node: Node, outputs: Sequence[Tensor]) -> None:
        """Raise GeGraphError unless outputs have the sizes and dtypes that torchair traced."""
        if len(outputs) != len(node.outputs):
            raise GeGraphError(f"{len(outputs)} outputs; the graph has {len(node.outputs)}")
        for output, descriptor in zip(outputs, node.outputs, strict=True):
            # torchair notes the shape of a view on the operator whose output it is a view of, so sizes have to do.
            if descriptor.shape is not None and output.numel() != math.prod(descriptor.shape):
                raise GeGraphError(
                    f"output {descriptor.name} has the shape {list(output.shape)}; torchair traced {list(descriptor.shape)}"
                )
            if descriptor.dtype is None:
                continue
            unrounded = self.wide and descriptor.dtype in ("int8", "int32") and output.is_floating_point()
            if not unrounded and output.dtype != (expected := self._dtype(descriptor.dtype)):
                raise GeGraphError(f"output {descriptor.name} is {output.dtype}; torchair traced {expected}")

    def _dtype(self, name: str) -> torch.dtype:
        dtype = getattr(torch, name)
        return torch.float32 if self.wide and dtype in HALVES else dtype

    def _outputs(
        self, values: dict[Source, Tensor], inputs: Sequence[Tensor], assigned: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The graph's outputs in memory of their own: none is a view of an input or a constant."""
        shared_storages = {each.untyped_storage().data_ptr() for each in (*inputs, *self._constants.values())}
        outputs = []
        for source, target in zip(self.graph.outputs, assigned, strict=True):
            value = self._upcast(values[source])
            shared = value is not target and value.untyped_storage().data_ptr() in shared_storages
            outputs.append(value.clone() if shared else value)
        return [
            value.contiguous() if target is None else _copied(target, value)
            for value, target in zip(outputs, assigned, strict=True)
        ]


def _is_const(node: Node) -> bool:
    return node.type == "Const"


def _copied(target: Tensor, value: Tensor) -> Tensor:
    return target if value is target else target.copy_(value)


def _bind(node: Node, wide: bool, group: Group | None) -> BoundOp:
    op = ge_ops.OPS.get(node.type)
    if op is None:
        raise GeGraphError(f"{node.type} {node.name}: operators of type {node.type} are not simulated")
    try:
        return op.bind(node, wide, group)
    except GeGraphError as error:
        raise GeGraphError(f"{node.type} {node.name}: {error}") from error


def _written_inputs(graph: GeGraph) -> list[int]:
    """Indices of the inputs that are written in place, each of which its writer alone may read."""
    written: list[int] = []
    for node in graph.nodes:
        targets = [node.inputs[place] for place in ge_ops.IN_PLACE.get(node.type, ())]
        indices = [_input_index(graph, node, target) for target in targets if target is not None]
        written += [index for index in indices if index is not None]
    return written


def _input_index(graph: GeGraph, writer: Node, target: Source) -> int | None:
    """The graph input that an operator writes; None for a copy, which is its own."""
    producer = graph.node(target.producer)
    others = [node.name for node in graph.readers(target) if node is not writer]
    if others:
        raise GeGraphError(
            f"{writer.type} {writer.name} writes {producer.name} in place, which {others[0]} reads too: their order is open"
        )
    if producer.type in INPUT_TYPES:
        return producer.attributes["index"]
    if producer.type not in ("TensorMove", *ge_ops.IN_PLACE):
        raise GeGraphError(
            f"{writer.type} {writer.name} writes in place what {producer.type} {producer.name} made; expected a graph input"
        )
    return None
