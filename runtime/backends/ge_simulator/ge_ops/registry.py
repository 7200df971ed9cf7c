"""The table of operators that the simulator can run, one Python function each.

A function is registered under the name of a GE operator. Its positional parameters are the operator's inputs and its
keyword-only parameters the operator's attributes, both by the names of the operator definition (the REG_OP comments in
torchair's auto_generated_ge_raw_ops.py), so that a graph's node is bound by name and whatever has no parameter is an error:

    @ge_op("RmsNorm")
    def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float) -> tuple[Tensor, Tensor]: ...

A parameter annotated `list[Tensor]` takes a dynamic input: x0, x1, ... of the definition's x. A default makes an input
optional. An input whose name is reserved in Python has a trailing underscore (`else_`). A keyword-only parameter `context`
receives a NodeContext, for operators that need to know more than their operands.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...base import Group
from ..ge_graph import ATTRIBUTE_DTYPES, GeGraphError, Node

HALVES = (torch.float16, torch.bfloat16)


class UnsupportedError(GeGraphError):
    """An operator, an input, an attribute or a value that is not simulated, or that the operator does not allow."""


@dataclass(frozen=True, slots=True)
class NodeContext:
    """The node of an operator and the mode of the simulator. `wide`: every narrower float is float32. `group`: the other
    ranks."""

    node: Node
    wide: bool
    group: Group | None = None

    def dtype(self, value: int | str) -> torch.dtype:
        """The torch dtype of an attribute that names one."""
        name = value if isinstance(value, str) else ATTRIBUTE_DTYPES.get(value)
        dtype = getattr(torch, name, None) if name else None
        if dtype is None:
            raise UnsupportedError(f"data type {value} is not supported")
        return self.upcast(dtype)

    def upcast(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self.wide and dtype in HALVES else dtype

    def output_dtype(self, index: int) -> torch.dtype | None:
        """The dtype that torchair traced for an output; None where it traced none."""
        dtype = self.node.outputs[index].dtype
        return None if dtype is None else self.dtype(dtype)


Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Op:
    """A registered operator. `neutral`: attributes that it does not simulate, each with the one value that changes nothing."""

    type: str
    call: Callable[..., Tensor | list[Tensor] | tuple[Tensor, ...]]
    neutral: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, node: Node, wide: bool, group: Group | None = None) -> BoundOp:
        """Check everything that does not depend on the values; raises UnsupportedError, naming what is not supported."""
        parameters = inspect.signature(self.call).parameters
        attributes = self._attributes(node, parameters)
        if "context" in parameters:
            attributes["context"] = NodeContext(node, wide, group)
        return BoundOp(self, self._inputs(node, parameters), attributes)

    def _inputs(self, node: Node, parameters: Mapping[str, inspect.Parameter]) -> dict[str, int | list[int]]:
        places: dict[str, int | list[int]] = {}
        for place, (name, source) in enumerate(zip(node.input_names, node.inputs, strict=True)):
            if source is None:
                continue
            parameter = _input_parameter(name, parameters)
            if parameter is None:
                raise UnsupportedError(f"input {name} is not supported")
            if parameter.annotation == "list[Tensor]":
                dynamic = places.setdefault(parameter.name, [])
                assert isinstance(dynamic, list)
                dynamic.append(place)
            else:
                places[parameter.name] = place
        for parameter in parameters.values():
            required = parameter.kind != parameter.KEYWORD_ONLY and parameter.default is parameter.empty
            if required and parameter.name not in places:
                raise UnsupportedError(f"input {parameter.name} is missing")
        return places

    def _attributes(self, node: Node, parameters: Mapping[str, inspect.Parameter]) -> Arguments:
        values = {}
        for name, value in node.attributes.items():
            parameter = parameters.get(name)
            if name.startswith("_") or name in IGNORED:
                continue
            if parameter is not None and parameter.kind == parameter.KEYWORD_ONLY and name != "context":
                values[name] = value
            elif name not in self.neutral:
                raise UnsupportedError(f"attribute {name} = {value!r} is not supported")
            elif value != self.neutral[name]:
                raise UnsupportedError(f"attribute {name} = {value!r} is not supported; only {self.neutral[name]!r} is")
        for parameter in parameters.values():
            required = parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty
            if required and parameter.name not in values and parameter.name != "context":
                raise UnsupportedError(f"attribute {parameter.name} is missing")
        return values


# Memory layouts of a device, which a CPU does not have.
IGNORED = ("input_layout_info", "output_layout_info")


def _input_parameter(name: str, parameters: Mapping[str, inspect.Parameter]) -> inspect.Parameter | None:
    """The parameter of an input: that of its name, or of its name without the number of a dynamic input."""
    exact = parameters.get(f"{name}_" if keyword.iskeyword(name) else name)
    if exact is not None and exact.kind != exact.KEYWORD_ONLY and exact.annotation != "list[Tensor]":
        return exact
    dynamic = parameters.get(name.rstrip("0123456789"))
    return dynamic if dynamic is not None and dynamic.annotation == "list[Tensor]" else None


@dataclass(frozen=True, slots=True)
class BoundOp:
    """An operator with the attributes of one node, and the places of its inputs."""

    op: Op
    inputs: Mapping[str, int | list[int]]
    attributes: Arguments

    def __call__(self, values: list[Tensor | None]) -> list[Tensor]:
        """The outputs, from the values of the node's inputs in order."""
        arguments: Arguments = {
            name: [values[i] for i in place] if isinstance(place, list) else values[place]
            for name, place in self.inputs.items()
        }
        result = self.op.call(**arguments, **self.attributes)
        return [result] if isinstance(result, Tensor) else list(result)


OPS: dict[str, Op] = {}


def ge_op(*types: str, **neutral: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for GE operators; `neutral`: see Op."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        for name in types:
            assert name not in OPS, name
            OPS[name] = Op(name, call, neutral)
        return call

    return register


def number(tensor: Tensor, name: str) -> int | float:
    """The value of an operand of one element; raises UnsupportedError for other sizes."""
    if tensor.numel() != 1:
        raise UnsupportedError(f"input {name} has {tensor.numel()} values; expected one")
    return tensor.item()


def integers(tensor: Tensor) -> list[int]:
    """The values of an operand that lists sizes, axes or indices."""
    return [int(value) for value in tensor.reshape(-1).tolist()]


def same_dtypes(**operands: Tensor) -> None:
    """Raise UnsupportedError unless all operands have one dtype, as the kernels of an NPU promote none."""
    dtypes = {name: value.dtype for name, value in operands.items()}
    if len(set(dtypes.values())) > 1:
        raise UnsupportedError(f"operands have several dtypes: {', '.join(f'{n} {_short(d)}' for n, d in dtypes.items())}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
