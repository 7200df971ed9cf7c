"""Traces of definitions: the ops that torch.export finds; made once for a module and its inputs, kept as long as the module."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from staticvl.compiler.graphs import GraphDef, example_inputs, trace
from staticvl.compiler.tracing import module_path, record
from staticvl.model_defs import ops
from staticvl.model_defs.layers import empty_parameter
from staticvl.runtime.artifact import GraphKey, TensorSpec

from .rank_models import model_of


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = empty_parameter(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.w, None)


def rows(name: str, count: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=(count, 4))


def made() -> GraphDef:
    with torch.device("meta"):
        module = Product()
    return GraphDef(GraphKey("decode", 2), module, (rows("x", 3),), (rows("y", 3),))


@pytest.fixture
def graph() -> GraphDef:
    return made()


def test_a_trace_is_shared_by_definitions_of_the_same_module_and_inputs(graph: GraphDef) -> None:
    assert trace(replace(graph, outputs=(rows("z", 3),))) is trace(graph)
    more = trace(replace(graph, inputs=(rows("x", 5),)))
    assert more is not trace(graph)
    assert [node.meta["val"].shape for node in more.outputs] == [(5, 2)]


def test_another_module_has_a_trace_of_its_own(graph: GraphDef) -> None:
    with torch.device("meta"):
        other = replace(graph, module=Product())
    assert trace(other) is not trace(graph)


def test_a_trace_goes_with_its_module() -> None:
    graph = made()
    program, module = weakref.ref(trace(graph)), weakref.ref(graph.module)
    assert program() is not None
    del graph
    gc.collect()
    assert module() is None and program() is None


CHECK = "aten._assert_tensor_metadata.default"  # torch.export notes dtypes with it; it computes nothing


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama", "qwen_vl"])
def test_a_trace_has_the_ops_that_torch_export_finds(family: str) -> None:
    for graph in model_of(family, 8).define(2).values():
        program = torch.export.export(graph.module, example_inputs(graph), strict=False)
        signature = program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        expected = [*described(program.graph, names, exported_path)]
        found = trace(graph)
        assert [*described(found.graph, {node.name: name for node, name in found.parameters.items()}, module_path)] == expected
        assert [node.name for node in found.inputs] == [spec.name.replace(".", "_") for spec in graph.inputs]


def described(graph: fx.Graph, parameters: dict[str, str], path_of: Any) -> Iterator[tuple[Any, ...]]:
    """Every node but CHECK: op, operands by their numbers, parameter, shape, strides and dtype, and the module of a call."""
    number: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if str(node.target) == CHECK:
            continue
        number[node] = f"%{len(number)}"
        values = node.meta.get("val", ())
        values = values if isinstance(values, tuple | list) else [values]
        layouts = [(tuple(value.shape), value.stride(), value.dtype) for value in values]
        operands = map_arg((node.args, node.kwargs), number.__getitem__)
        target = str(node.target) if node.op == "call_function" else parameters.get(node.name)
        yield node.op, target, repr(operands), layouts, node.op == "call_function" and path_of(node)


def exported_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {"": ("graph", None)}).values())
    return stack[-1][0] or "graph"


class Changing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


def test_a_module_that_changes_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"add_.* changes a tensor in place"):
        record(Changing(), ["x"], [torch.empty(2, device="meta")])


class Foreign(nn.Module):
    other = torch.empty(3, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other


def test_a_tensor_of_no_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tensor \[3\] \(in graph\) is neither a parameter"):
        record(Foreign(), ["x"], [torch.empty(3, device="meta")])


class Unchanged(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(x.dtype) + 1, x


def test_an_op_that_returns_its_operand_is_left_out() -> None:
    found = record(Unchanged(), ["x"], [torch.empty(3, device="meta")])
    assert [str(node.target) for node in found.graph.nodes] == ["x", "aten.add.Tensor", "output"]
    assert found.outputs[1] is found.inputs[0]
