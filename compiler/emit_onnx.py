"""Traced graph -> ONNX model whose weights lie in the artifact's shared weight files.

Each op of the vocabulary has one lowering here; so have the few aten ops that models use for reshaping and adding. An
op without a lowering is an error that names it. Lowerings emit the fused operators of onnxruntime directly, so that
no graph optimiser is needed and every bucket refers to the weights in the same form:

- linear: FusedMatMul with transB, which takes weights [N, C] as checkpoints store them; weights in 8 or 4 bits: MatMulNBits;
  weights in 16 bits, for which there are no kernels, are upcast some rows at a time;
- linear_w8a8: MatMulIntegerToFloat, whose activations are uint8 around 128: kernels of processors with VNNI multiply unsigned
  by signed, and onnxruntime's others are slower by an order of magnitude. An input of several layers is quantised once;
- cached_attention: com.microsoft.GroupQueryAttention, whose present outputs are bound to the memory of its past inputs.
  A padded chunk counts as whole: rows past the last real token are written and overwritten by the next step.
  int8_cached_attention is the same operator, which takes scales of channels as inputs and rounds as defined;
- rope: RotaryEmbedding with cos and sin as graph inputs, since their values depend on the request in some families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import msgspec
import onnx
from onnx import helper
from torch.fx import Node

from ..model_defs.ops import NAMESPACE
from ..runtime.artifact import Collective, Segment, Step, TensorSpec, WeightSpec
from .graphs import GraphDef, trace
from .onnx_graph import LOWERINGS, UPCASTING, Emitter
from .onnx_graph.emitter import CONTRIB, DEFAULT_KERNELS, DTYPES, shape_of
from .onnx_graph.products import expands
from .segments import Part, cut
from .tracing import Trace, module_path

OPSET = 23
IR_VERSION = 10


class UnsupportedOpError(NotImplementedError):
    """The traced graph has an op without a lowering."""


def emit(graph: GraphDef, weights: Mapping[str, WeightSpec], *, exact: bool = False) -> bytes:
    """Trace and lower one graph; returns the serialised ONNX model. Raises UnsupportedOpError naming an op without lowering.

    exact: the exact reference graph of one whose kernels round activations: slow, for checking everything else about it.
    """
    program = trace(graph)
    steps = cut(graph, program).steps
    assert len(steps) == 1, f"{graph.name} is cut; see emit_steps"
    (part,) = steps
    assert isinstance(part, Part)
    return _emit_part(graph, program, part, graph.name, weights, exact=exact)


@dataclass(frozen=True, slots=True)
class EmittedSteps:
    """One rank's graph as the `steps` and `buffers` of a GraphSpec; `files` are those of the segments."""

    steps: tuple[Step, ...]
    buffers: tuple[TensorSpec, ...]
    files: dict[str, bytes]


def emit_steps(graph: GraphDef, weights: Mapping[str, WeightSpec], file: str, *, exact: bool = False) -> EmittedSteps:
    """As `emit`, one file FILE/000.onnx, FILE/001.onnx ... for each segment between collectives.

    `weights` may be those of any rank: segments name a weight file without its folder, so that they are the same for all.
    """
    program = trace(graph)
    plan = cut(graph, program)
    beside = {name: msgspec.structs.replace(spec, file=PurePath(spec.file).name) for name, spec in weights.items()}
    steps: list[Step] = []
    files: dict[str, bytes] = {}
    for step in plan.steps:
        if isinstance(step, Collective):
            steps.append(step)
            continue
        number = f"{len(files):03d}"
        segment = Segment(
            file=f"{file}/{number}.onnx",
            inputs=tuple(spec.name for spec in step.inputs),
            outputs=tuple(spec.name for spec in step.outputs),
        )
        files[segment.file] = _emit_part(graph, program, step, f"{graph.name}.{number}", beside, exact=exact)
        steps.append(segment)
    return EmittedSteps(tuple(steps), plan.buffers, files)


def _emit_part(
    graph: GraphDef,
    program: Trace,
    part: Part,
    name: str,
    weights: Mapping[str, WeightSpec],
    *,
    exact: bool,
) -> bytes:
    emitter, outputs = _lowered(graph, program, part, weights, exact=exact)
    return _model(emitter, name, part, outputs).SerializeToString()


def _lowered(
    graph: GraphDef, program: Trace, part: Part, weights: Mapping[str, WeightSpec], *, exact: bool
) -> tuple[Emitter, list[str]]:
    """An emitter that holds the nodes of a part, and the names of what leaves it."""
    emitter = Emitter(weights, graph.constants, graph.kernels or DEFAULT_KERNELS, exact=exact)
    emitter.names |= program.parameters | part.entering
    for node in part.nodes:
        emitter.names[node] = _lower(emitter, node)
    # onnxruntime runs nodes without inputs in an order that depends on their place in this list, the first as late as it can:
    # in another place, all weights would be expanded before the first layer runs.
    emitter.nodes.sort(key=lambda node: not expands(emitter, node))
    return emitter, _own_names(emitter, part)


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """One emitted file: the traced nodes whose values it holds, by the names of the values, and its ONNX nodes in order."""

    names: dict[Node, str]
    nodes: tuple[onnx.NodeProto, ...]
    outputs: dict[str, str]  # what leaves the file: name in `names` -> name in the file


def emitted_values(graph: GraphDef, program: Trace, weights: Mapping[str, WeightSpec]) -> tuple[Values, ...]:
    """The values of each file by the values of the definition, for tools that inspect a running graph."""
    files = []
    for part in cut(graph, program).parts:
        emitter, outputs = _lowered(graph, program, part, weights, exact=False)
        names = {node: emitter.names[node] for node in (*part.entering, *part.nodes)}
        renamed = dict(zip(outputs, (spec.name for spec in part.outputs), strict=True))
        files.append(Values({k: v for k, v in names.items() if isinstance(v, str)}, tuple(emitter.nodes), renamed))
    return tuple(files)


def _own_names(e: Emitter, part: Part) -> list[str]:
    """The names of the values that leave a part; a value that shares its name with another, since its op does nothing, is
    copied."""
    used = {*part.entering.values(), *e.initializers}
    names: list[str] = []
    for node in part.leaving:
        value = e[node]
        names.append(e.node("Identity", [value]) if value in used else value)
        used.add(names[-1])
    return names


def _lower(e: Emitter, node: Node) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        value, index = node.args
        return e.names[value][index]  # type: ignore[index]
    name = str(node.target).removesuffix(".default") if NAMESPACE in str(node.target) else str(node.target)
    e.scope = module_path(node)
    if name in ("aten.flatten.using_ints", "aten.view.default") and node.args[0] in e.names and e[node.args[0]] in e.weights:
        return e.weight(e[node.args[0]], shape_of(node))  # a weight in another shape: same bytes, no node
    if name not in LOWERINGS:
        raise UnsupportedOpError(f"{name} (in {e.scope}) has no ONNX lowering; supported: {', '.join(sorted(LOWERINGS))}")

    def argument(value: Any) -> Any:
        if isinstance(value, Node):
            operand = e.weight(e[value]) if _is_parameter(e, value) else e[value]
            return operand if name in UPCASTING else e.upcast(operand)
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        return value

    return LOWERINGS[name](e, node, *map(argument, node.args), **node.kwargs)


def _is_parameter(e: Emitter, node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder" and (e[node] in e.weights or e[node] in e.constants)


def _model(e: Emitter, name: str, part: Part, outputs: Sequence[str]) -> onnx.ModelProto:
    def info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], spec.shape)

    renames = dict(zip(outputs, (spec.name for spec in part.outputs), strict=True))
    for node in e.nodes:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = renames.get(value, value)
    proto = helper.make_graph(
        e.nodes,
        name,
        [*map(info, part.inputs)],
        [*map(info, (*part.outputs, *e.between))],
        [*e.initializers.values()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="staticvl")
