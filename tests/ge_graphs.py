"""GE graphs for tests: made by the real torchair, from torch functions or from its operator constructors.

They run on a simulator of no card: what an operator computes is tested at sizes so small that a card would refuse them.
tests/test_card_rules.py tests what cards refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.base import Group
from staticvl.runtime.backends.ge_simulator.simulator import Simulator


@dataclass(frozen=True)
class Lowered:
    """A graph with the inputs that torchair gave it (copies from before the run) and the outputs to write into an input."""

    data: bytes
    inputs: tuple[Tensor, ...]
    assigned: tuple[int | None, ...]
    result: Any  # what the traced function returned, computed by the simulator

    def run(self, *, wide: bool = False) -> list[Tensor]:
        inputs = [each.clone() for each in self.inputs]
        assigned = [None if i is None else inputs[i] for i in self.assigned]
        return Simulator(self.data, wide=wide, card=None)(inputs, assigned)


def lower(
    function: Callable[..., Any], *inputs: Tensor, group: Group | None = None, decompositions: dict[Any, Any] | None = None
) -> Lowered:
    """A torch function through torch.compile and torchair, run on the simulator. `decompositions`: torchair's."""
    host = torchair_host.load()
    seen: dict[str, Any] = {}

    def executor(data: bytes) -> Callable[..., list[Tensor]]:
        simulator = Simulator(data, group=group, card=None)

        def execute(given: Sequence[Tensor], assigned: Sequence[Tensor | None] = ()) -> list[Tensor]:
            places = [next((i for i, each in enumerate(given) if each is target), None) for target in assigned]
            seen.update(data=data, inputs=tuple(each.clone() for each in given), assigned=tuple(places))
            return simulator(given, assigned)

        return execute

    torch._dynamo.reset()
    backend = host.torchair.get_npu_backend(
        compiler_config=host.torchair.CompilerConfig(), custom_decompositions=decompositions or {}
    )
    compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    with host.running_on(executor), torch.no_grad():
        result = compiled(*inputs)
    return Lowered(**seen, result=result)


def build(make: Callable[..., Any], *inputs: Tensor) -> bytes:
    """A graph straight from torchair's operator constructors: make(ge, *inputs) returns what goes to NetOutput."""
    torchair_host.load()
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import GeGraph, torch_type_to_ge_type

    with GeGraph() as graph:
        datas = []
        for i, each in enumerate(inputs):
            dtype = torch_type_to_ge_type(each.dtype)
            data = ge.Data(index=i, dtype=dtype, shape=list(each.shape), placement="NPU", node_name=f"in{i}")
            data.set_meta(each)  # operator constructors ask for dtypes
            datas.append(data)
        outputs = make(ge, *datas)
        ge.NetOutput(list(outputs) if isinstance(outputs, (list, tuple)) else [outputs])
    return graph.SerializeToString()


def compute(make: Callable[..., Any], *inputs: Tensor, wide: bool = False) -> list[Tensor]:
    """The outputs of such a graph."""
    return Simulator(build(make, *inputs), wide=wide, card=None)(list(inputs))


def edited(data: bytes, edit: Callable[[Any], None]) -> bytes:
    """A graph after a change to its GraphDef."""
    torchair_host.load()
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    model.ParseFromString(data)
    edit(model.graph[0])
    return model.SerializeToString()


def set_attribute(graph: Any, op_type: str, name: str, value: Any) -> None:
    write_value(next(op for op in graph.op if op.type == op_type).attr[name], value)


def write_value(attribute: Any, value: Any) -> None:
    """Text, a truth value, an integer or a number, as an attribute of a node."""
    if isinstance(value, str):
        attribute.s = value.encode()
    elif isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, int):
        attribute.i = value
    else:
        attribute.f = value
