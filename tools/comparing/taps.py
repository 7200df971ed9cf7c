"""A captured run again, with every value in sight: the errors of all operators of a compiled graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ...compiler.graphs import GraphDef, trace
from ...compiler.lockstep import ArrayMember, Meeting, Member, results_of
from ...compiler.tap_onnx import Tapped, tap
from ...model_defs.group import member_of
from ...runtime.artifact import GraphSpec, Segment, WeightSpec
from ...runtime.ascend.weights import map_weight
from ...runtime.backends.base import cache_name
from ...runtime.backends.ort import OrtBackend
from .capture import Captured
from .checkpoint import definer, narrowed
from .culprit import matched_culprit, named_culprit
from .static_side import StaticSide
from .walk import Find, OpError, Walk

Errors = dict[Node, OpError]


def inspect(side: StaticSide, run: Captured, limit: float) -> tuple[OpError | None, list[Errors]]:
    """The first wrong operator of a captured run, if any, and the errors of all, by rank."""
    if side.artifact.manifest.backend == "ascend":
        errors = _ascend(side, run)
        return (matched_culprit(errors), [errors]) if errors else (None, [])
    ranks = _onnx(side, run)
    found = [(error, rank) for rank, errors in enumerate(ranks) if (error := named_culprit(errors, limit))]
    if not found:
        return None, ranks
    order = [[*errors.values()] for errors in ranks]
    first, rank = min(found, key=lambda each: _place(order[each[1]], each[0]))
    return dataclasses.replace(first, rank=rank), ranks


def _place(order: list[OpError], error: OpError) -> int:
    return next((i for i, each in enumerate(order) if each.name == error.name), len(order))


# ---- the definition


def definition(side: StaticSide, graph: GraphSpec) -> GraphDef:
    """One rank's definition of a graph."""
    assert side.config is not None
    manifest = side.artifact.manifest
    cache = narrowed(manifest.cache, side.config.text.rank_kv_heads(manifest.tp))
    return definer(side.config, side.facts, cache, manifest.quant, manifest.tp)(graph.kind, graph.bucket, graph.images)


def _parameters(side: StaticSide, weights: Mapping[str, WeightSpec], graph: GraphDef) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(value) for name, value in graph.constants.items()}
    for name, _ in graph.module.named_parameters():
        if name not in found:
            weight = map_weight(side.artifact.folder, weights[name])
            found[name] = weight.float() if weight.is_floating_point() else weight
    return found


def _inputs(graph: GraphDef, run: Captured, rank: int, ranks: int) -> list[Tensor]:
    """What the rank's graph takes, in order."""
    arrays = [
        run.feed[spec.name] if spec.name in run.feed else np.split(run.caches[spec.name], ranks, axis=1)[rank]
        for spec in graph.inputs
    ]
    return [torch.from_numpy(np.ascontiguousarray(array)).clone() for array in arrays]


# ---- ONNX Runtime


def _onnx(side: StaticSide, run: Captured) -> list[Errors]:
    """The errors of every rank, run in lockstep."""
    manifest, folder = side.artifact.manifest, side.artifact.folder
    graph = definition(side, run.graph)
    files = [(folder / name).read_bytes() for name in run.graph.files]
    referred = side.rank_weights[0]
    if run.graph.steps:  # segments name a weight file without its folder, which a tap does not mind
        referred = {name: msgspec.structs.replace(spec, file=spec.file.split("/")[-1]) for name, spec in referred.items()}
    tapped = tap(graph, referred, files)
    spec = _with_taps(msgspec.structs.replace(run.graph, inputs=graph.inputs, outputs=graph.outputs), tapped)
    models = {name: each.data for name, each in zip(run.graph.files, tapped, strict=True)}
    cache = narrowed(manifest.cache, side.config.text.rank_kv_heads(manifest.tp)) if side.config else manifest.cache
    program = trace(graph)
    meeting = Meeting(manifest.tp)

    def work(rank: int) -> Errors:
        group = ArrayMember(meeting, rank) if manifest.tp > 1 else None
        try:
            backend = OrtBackend(folder, cache, threads=1, shared=False, group=group, models=models)
            inputs = _inputs(graph, run, rank, manifest.tp)
            for each, value in zip(graph.inputs, inputs, strict=True):
                if each.name not in run.feed:
                    backend.write_cache(each.name, value.numpy())
            backend.run(spec, run.feed, 0, run.image)
            find = _by_name(backend, spec, tapped, graph, run.image)
            parameters = _parameters(side, side.rank_weights[rank], graph)
            with member_of(Member(meeting, rank)):
                return Walk(program, parameters).run(inputs, find)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(manifest.tp) as pool:
        return results_of([pool.submit(work, rank) for rank in range(manifest.tp)])


def _with_taps(graph: GraphSpec, tapped: list[Tapped]) -> GraphSpec:
    """The graph with a buffer for every tap; taps of different files get names of their own."""
    steps, buffers, number = [], [*(graph.buffers or ())], 0
    for step in graph.plan:
        if isinstance(step, Segment):
            taps = [*tapped[number].taps.values()]
            step = msgspec.structs.replace(step, outputs=(*step.outputs, *(spec.name for spec in taps)))
            known = {spec.name for spec in buffers}
            assert not known & {spec.name for spec in taps}, "taps of one graph have different names"
            buffers += taps
            number += 1
        steps.append(step)
    return msgspec.structs.replace(graph, steps=tuple(steps), buffers=tuple(buffers))


def _by_name(
    backend: OrtBackend, spec: GraphSpec, tapped: list[Tapped], graph: GraphDef, image: int
) -> Callable[[Node, Tensor], Tensor | None]:
    """Finds a traced node's value among taps, and what left the graph in its output or its cache."""
    arrays = {node: backend.buffers[spec.file][each.name] for part in tapped for node, each in part.taps.items()}
    results = trace(graph).graph.output_node().args[0]
    for node, output in zip(results, graph.outputs, strict=True):  # type: ignore[arg-type]
        name = cache_name(output.name, image)
        if name is None:
            arrays[node] = backend.outputs[spec.file]
        else:
            arrays[node] = backend.read_cache(name, output.shape[0])  # type: ignore[index]

    def find(node: Node, _: Tensor) -> Tensor | None:
        array = arrays.get(node)
        return None if array is None else torch.from_numpy(np.array(array))

    return find


# ---- Ascend


def _ascend(side: StaticSide, run: Captured) -> Errors:
    from .ge_taps import matches

    graph = definition(side, run.graph)
    find: Find | None = matches(side, run)
    if find is None:
        return {}
    parameters = _parameters(side, side.rank_weights[0], graph)
    return Walk(trace(graph), parameters).run(_inputs(graph, run, 0, 1), find)
