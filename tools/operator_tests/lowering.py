"""A case as a graph of one operator, lowered as an artifact's graphs are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...compiler.emit_ascend import Emitted, emit
from ...compiler.graphs import GraphDef
from ...runtime.artifact import GraphKey, TensorSpec
from ...runtime.backends.ge_simulator import ge_graph
from .case import Case, Operands, Setting, sizes_of


class LoweringError(ValueError):
    """A case that does not become the operator that it tests."""


def lower(case: Case, setting: Setting) -> Emitted:
    """Raises LoweringError where one of the case's operators is not in the graph."""
    emitted = emit(definition(case, sizes_of(case, setting), setting), setting.dtype)
    missing = set(case.operators) - set(ge_graph.parse(emitted.graph).types())
    if missing:
        raise LoweringError(f"{case.name}: the graph has no {', '.join(sorted(missing))}")
    return emitted


def definition(case: Case, operands: Operands, setting: Setting) -> GraphDef:
    """Its outputs are in the order of `expected`."""
    inputs = tuple(_spec(name, x) for name, x in as_fed(operands.inputs, setting).items())
    outputs = tuple(_output(name, each.value, operands, setting) for name, each in operands.expected.items())
    return GraphDef(GraphKey("decode", 1), case.module(), inputs, outputs, quant=setting.quant)


def as_fed(inputs: Mapping[str, Tensor], setting: Setting) -> dict[str, Tensor]:
    """Inputs in the dtypes in which a graph takes them: caches in its own."""
    fed = {}
    for name, x in inputs.items():
        in_floats = x.is_floating_point() and name.partition(".")[0] in ("k_cache", "v_cache", "cross_k", "cross_v")
        fed[name] = (x.to(setting.torch_dtype) if in_floats else x).contiguous()
    return fed


def _spec(name: str, x: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape))


def _output(name: str, value: Tensor, operands: Operands, setting: Setting) -> TensorSpec:
    cache = name.removesuffix(".out")
    return _spec(name, as_fed(operands.inputs, setting)[cache] if cache in operands.inputs else value)
