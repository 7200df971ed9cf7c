"""Traces of definitions: made once for a module and its inputs, kept as long as the module, without Python stacks."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import config as fx_config

from staticvl.compiler.graphs import GraphDef, trace
from staticvl.model_defs import ops
from staticvl.model_defs.layers import empty_parameter
from staticvl.runtime.artifact import GraphKey, TensorSpec


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
    assert more.graph_signature.user_outputs and [*more.graph.nodes][-2].meta["val"].shape == (5, 2)


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


def test_ops_have_the_modules_that_they_are_of_and_no_python_stack(graph: GraphDef) -> None:
    before = fx_config.do_not_emit_stack_traces
    calls = [node for node in trace(graph).graph.nodes if node.op == "call_function"]
    assert calls and all("nn_module_stack" in node.meta for node in calls)
    assert not [node for node in calls if node.stack_trace]
    assert fx_config.do_not_emit_stack_traces == before
