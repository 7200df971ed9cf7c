"""The errors of all operators of a compiled graph, from a captured run that is repeated with taps on every value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ...compiler.graphs import GraphContext, GraphDef, define_graph, trace
from ...compiler.lockstep import ArrayGroup, Lockstep
from ...compiler.tap_onnx import Tapped, tap
from ...compiler.tracing import Trace
from ...compiler.weight_views import map_parameter
from ...model_defs.layers import without_rounding
from ...runtime.artifact import CacheSpec, GraphKey, GraphSpec, Segment, Step, WeightSpec
from ...runtime.backends.base import Backend, cache_name
from ...runtime.backends.ort import OrtBackend
from .capture import CapturedRun
from .checkpoint import with_heads
from .first_fault import first_fault_by_content, first_fault_by_name, first_faulty_output
from .operator_errors import OperatorComparison, OpError, ValueFinder
from .static_side import StaticSide

Errors = dict[Node, OpError]
MAX_OPEN_GRAPHS = 8


class Inspector:
    """An inspector of the graphs of one side. It keeps the last few graphs open."""

    def __init__(self, side: StaticSide, limit: float) -> None:
        """`limit`: see Thresholds.operators."""
        self.side, self.limit = side, limit
        self.opened: dict[str, OnnxGraph] = {}

    def inspect(self, run: CapturedRun) -> tuple[OpError | None, list[Errors]]:
        """The first wrong operator of a captured run, if any, and the errors of all, by rank."""
        if self.side.artifact.manifest.backend == "ascend":
            ranks = _ascend(self.side, run)
            find_fault = first_faulty_output if run.graph.eager else first_fault_by_content
            faults = [find_fault(errors) for errors in ranks]
        else:
            ranks = self._graph(run.graph).errors(run)
            faults = [first_fault_by_name(errors, self.limit) for errors in ranks]
        faulty_ranks = [(error, rank) for rank, error in enumerate(faults) if error]
        if not faulty_ranks:
            return None, ranks
        order = [[*errors.values()] for errors in ranks]
        first, rank = min(faulty_ranks, key=lambda each: _place(order[each[1]], each[0]))
        return dataclasses.replace(first, rank=rank), ranks

    def _graph(self, graph: GraphSpec) -> OnnxGraph:
        if graph.name not in self.opened:
            if len(self.opened) == MAX_OPEN_GRAPHS:
                del self.opened[next(iter(self.opened))]
            self.opened[graph.name] = OnnxGraph(self.side, graph)
        return self.opened[graph.name]


def _place(order: list[OpError], error: OpError) -> int:
    return next((i for i, each in enumerate(order) if each.name == error.name), len(order))


# ---- the definition


def definition(side: StaticSide, graph: GraphSpec) -> tuple[GraphDef, Trace]:
    """One rank's definition of a graph, and its trace. Ascend's graphs are compared without rounding."""
    assert side.config is not None
    manifest = side.artifact.manifest
    context = GraphContext(
        config=side.config,
        image=side.info.image,
        cache=rank_cache(side),
        quant=manifest.quant,
        ranks=manifest.tp,
        candidates=graph.candidates,
    )
    return traced(context, graph.graph_key, rounded=manifest.backend == "onnx")


def rank_cache(side: StaticSide) -> CacheSpec:
    """The cache of one rank."""
    assert side.config is not None
    manifest = side.artifact.manifest
    return with_heads(manifest.cache, side.config.text.rank_kv_heads(manifest.tp))


@functools.lru_cache(maxsize=16)  # both sides, and several cases, use the same few
def traced(context: GraphContext, key: GraphKey, *, rounded: bool) -> tuple[GraphDef, Trace]:
    """The definition of a graph, and its trace."""
    graph = define_graph(context, key)
    if not rounded:
        without_rounding(graph.module)
    return graph, trace(graph)


def parameters_of(side: StaticSide, weights: Mapping[str, WeightSpec], graph: GraphDef) -> dict[str, Tensor]:
    parameters = {name: torch.from_numpy(value) for name, value in graph.constants.items()}
    for name, parameter in graph.module.named_parameters():
        if name not in parameters:
            weight = map_parameter(side.artifact.folder, weights, name, parameter.shape, graph.heads.get(name, 0))
            parameters[name] = weight.float() if weight.is_floating_point() else weight
    return parameters


def inputs_of(graph: GraphDef, run: CapturedRun, rank: int, ranks: int) -> list[Tensor]:
    """The inputs of a rank's graph, in order."""
    heads = 2 if "block_table" in run.feed else 1  # the axis of the heads: of pages, and of slots
    arrays = [
        run.feed[spec.name] if spec.name in run.feed else np.split(run.caches[spec.name], ranks, axis=heads)[rank]
        for spec in graph.inputs
    ]
    return [torch.from_numpy(np.ascontiguousarray(array)).clone() for array in arrays]


# ---- ONNX Runtime


class OnnxGraph:
    """A compiled graph with taps, on every rank, and its definition."""

    def __init__(self, side: StaticSide, graph: GraphSpec) -> None:
        manifest, folder = side.artifact.manifest, side.artifact.folder
        self.ranks = manifest.tp
        self.definition, self.program = definition(side, graph)
        weights = side.rank_weights[0]
        if graph.steps:  # segments name a weight file without its folder
            weights = {name: msgspec.structs.replace(spec, file=Path(spec.file).name) for name, spec in weights.items()}
        self.tapped = tap(self.definition, self.program, weights, [(folder / name).read_bytes() for name in graph.files])
        rank_graph = msgspec.structs.replace(graph, inputs=self.definition.inputs, outputs=self.definition.outputs)
        self.spec = _with_taps(rank_graph, self.tapped)
        models = {name: each.data for name, each in zip(graph.files, self.tapped, strict=True)}
        cache = rank_cache(side)
        self.lockstep = Lockstep(self.ranks)
        groups = [ArrayGroup(self.lockstep, rank) if self.ranks > 1 else None for rank in range(self.ranks)]
        self.backends = [OrtBackend(folder, cache, threads=1, shared=False, group=group, models=models) for group in groups]
        self.comparisons = [
            OperatorComparison(self.program, parameters_of(side, side.rank_weights[rank], self.definition))
            for rank in range(self.ranks)
        ]

    def errors(self, run: CapturedRun) -> list[Errors]:
        """The errors of every rank, in lockstep."""
        return self.lockstep.run(lambda rank: self._rank_errors(run, rank))

    def _rank_errors(self, run: CapturedRun, rank: int) -> Errors:
        backend, inputs = self.backends[rank], inputs_of(self.definition, run, rank, self.ranks)
        for each, value in zip(self.definition.inputs, inputs, strict=True):
            if each.name not in run.feed:
                backend.write_cache(each.name, value.numpy())
        backend.run(self.spec, run.feed, 0, run.image)
        return self.comparisons[rank].run(inputs, self._finder(backend, run.image))

    def _finder(self, backend: OrtBackend, image: int) -> ValueFinder:
        """A finder of a traced node's value among taps, outputs and caches."""
        arrays = {node: backend.free[name] for part in self.tapped for node, name in part.taps.items()}
        result = backend.outputs[self.spec.file].get(self.definition.outputs[0].name)
        return named(arrays | outputs_of(self.program, self.definition, backend, result, image))


def outputs_of(
    program: Trace, graph: GraphDef, backend: Backend, result: np.ndarray | None, image: int
) -> dict[Node, np.ndarray]:
    """The output values of a graph by traced node: its first output, which is `result` unless it is cached, and its caches."""
    values: dict[Node, np.ndarray] = {}
    for node, output in zip(program.outputs, graph.outputs, strict=True):
        name = cache_name(output.name, image)
        value = backend.read_cache(name, output.shape[0]) if name else result if output is graph.outputs[0] else None
        if value is not None:
            values[node] = value
    return values


def named(arrays: Mapping[Node, np.ndarray]) -> ValueFinder:
    """A finder of values that are given by traced node."""

    def find(node: Node, expected: Tensor) -> Tensor | None:
        array = arrays.get(node)
        return None if array is None or array.shape != expected.shape else torch.from_numpy(np.array(array))

    return find


def _with_taps(graph: GraphSpec, tapped: list[Tapped]) -> GraphSpec:
    """The graph with every tap among the outputs of its segments."""
    items: list[Step] = []
    taps_left = [each.taps.values() for each in tapped]
    for item in graph.plan:
        taps = taps_left.pop(0) if isinstance(item, Segment) else ()
        items.append(msgspec.structs.replace(item, outputs=(*item.outputs, *taps)) if isinstance(item, Segment) else item)
    return msgspec.structs.replace(graph, steps=tuple(items))


# ---- Ascend


def _ascend(side: StaticSide, run: CapturedRun) -> list[Errors]:
    """The errors of every rank, in lockstep."""
    from .ge_taps import GeGraph

    definition_, program = definition(side, run.graph)
    ranks, cache, lockstep = side.artifact.manifest.tp, rank_cache(side), Lockstep(side.artifact.manifest.tp)
    spec = msgspec.structs.replace(run.graph, inputs=definition_.inputs, outputs=definition_.outputs)

    def errors_of_rank(rank: int) -> Errors:
        group = ArrayGroup(lockstep, rank) if ranks > 1 else None
        inputs = inputs_of(definition_, run, rank, ranks)
        caches = {
            each.name: value.numpy() for each, value in zip(spec.inputs, inputs, strict=True) if each.name not in run.feed
        }
        ge = GeGraph(side, spec, cache, rank, group)
        result = ge.run(run.feed, caches, run.image)
        # A program calls the definitions' own operators: only its outputs are visible.
        find = named(outputs_of(program, definition_, ge.backend, result, run.image)) if spec.eager else ge.find
        return OperatorComparison(program, parameters_of(side, side.rank_weights[rank], definition_)).run(inputs, find)

    return lockstep.run(errors_of_rank)
