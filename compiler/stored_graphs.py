"""The graphs of a build: reused from the artifact or an interrupted build, or compiled.

A finished graph is noted in a journal at once, so that it survives an interrupted build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from ..runtime.artifact import FileSpec, GraphKey, GraphSpec, Record, StageSpec, WeightSpec
from .digests import all_intact
from .fingerprint import GraphDigests
from .inputs import BuildInputs
from .leftovers import JOURNAL
from .plan import stages


class JournalEntry(Record, frozen=True, kw_only=True):
    """A finished graph."""

    graph: GraphSpec
    files: dict[str, FileSpec]


@dataclass(frozen=True, slots=True)
class StoredGraphs:
    """Each stage with its graphs, and the files of them all."""

    stages: tuple[StageSpec, ...]
    files: dict[str, FileSpec]
    traced: tuple[str, ...]  # names of graphs compiled by this build
    reused: tuple[str, ...]  # names of graphs that were there already


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage of a build, and the key of each of its graphs."""

    inputs: BuildInputs
    weights: dict[str, WeightSpec]
    keys: dict[GraphKey, str]

    def missing(self, entries: dict[str, JournalEntry]) -> list[GraphKey]:
        """Graphs that have no entry."""
        return [graph for graph, key in self.keys.items() if key not in entries]

    def stored(self, entries: dict[str, JournalEntry]) -> list[JournalEntry]:
        return [entries[self.keys[graph]] for graph in self.inputs.plan.graphs]


def store_graphs(inputs: BuildInputs, key: str, weights: list[dict[str, WeightSpec]]) -> StoredGraphs:
    """`key` is the digest of the sources of the weights, `weights` are those of each stage's first rank."""
    parts = _stages(inputs, key, weights)
    reused = _reusable(inputs, parts)
    entries = reused | _compiled(inputs, parts, reused)
    stored = [part.stored(entries) for part in parts]
    return StoredGraphs(
        stages=tuple(
            StageSpec(cache=part.inputs.plan.cache, graphs=tuple(entry.graph for entry in own), weights=part.weights)
            for part, own in zip(parts, stored, strict=True)
        ),
        files={name: spec for own in stored for entry in own for name, spec in entry.files.items()},
        traced=tuple(entry.graph.name for key, entry in entries.items() if key not in reused),
        reused=tuple(entry.graph.name for entry in reused.values()),
    )


def _stages(inputs: BuildInputs, key: str, weights: list[dict[str, WeightSpec]]) -> list[_Stage]:
    configs = stages(inputs.config, inputs.options.pp)
    parts = [replace(inputs, config=config, plan=inputs.plan.of_stage(i)) for i, config in enumerate(configs)]
    return [_Stage(part, own, graph_keys(part, key)) for part, own in zip(parts, weights, strict=True)]


def graph_keys(inputs: BuildInputs, key: str) -> dict[GraphKey, str]:
    """The digest of the sources of each graph of a stage."""
    digests = GraphDigests(inputs.options, inputs.config, inputs.info, inputs.plan, key)
    return {graph: digests.of(graph) for graph in inputs.plan.graphs}


# ---- graphs that are there already


def _reusable(inputs: BuildInputs, parts: list[_Stage]) -> dict[str, JournalEntry]:
    """Graphs that need not be compiled again, by key."""
    finished = dict(_finished(inputs))
    entries = {key: finished[key] for part in parts for key in part.keys.values() if key in finished}
    return {key: entry for key, entry in entries.items() if all_intact(inputs.out, entry.files) and not _disturbed(entry.graph)}


def _finished(inputs: BuildInputs) -> Iterator[tuple[str, JournalEntry]]:
    """Graphs of the old artifact, then those of an interrupted build, by key."""
    if old := inputs.old:
        for graph in (graph for stage in range(old.pp) for graph in old.of_stage(stage).graphs):
            yield graph.key, JournalEntry(graph=graph, files={name: old.files[name] for name in graph.files})
    journal = inputs.out / JOURNAL
    if journal.is_file():
        for line in journal.read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):  # a line cut short by a crash
                entry = msgspec.json.decode(line, type=JournalEntry)
                yield entry.graph.key, entry


def _disturbed(graph: GraphSpec) -> bool:
    """Whether the machine was busy when kernels were measured; then they are measured again."""
    return bool(graph.kernels and graph.kernels.busy)


# ---- graphs that are missing


def _compiled(inputs: BuildInputs, parts: list[_Stage], reused: dict[str, JournalEntry]) -> dict[str, JournalEntry]:
    """The missing graphs, compiled and noted, by key."""
    missing = [part.missing(reused) for part in parts]
    if not any(missing):
        return {}
    from .make import GraphMaker

    entries: dict[str, JournalEntry] = {}
    progress = inputs.progress
    with progress.stage("compiling graphs", sum(map(len, missing)), "graph") as advance:
        for i, (part, graphs) in enumerate(zip(parts, missing, strict=True)):
            if not graphs:
                continue
            maker = GraphMaker(inputs.options, part.inputs.config, inputs.info, part.inputs.plan, part.weights)
            for graph in graphs:
                key = part.keys[graph]
                entries[key] = entry = _noted(inputs, *maker.make(graph, key))
                progress.say((f"stage {i}  " if len(parts) > 1 else "") + _describe(entry.graph))
                advance(1)
    return entries


def _noted(inputs: BuildInputs, graph: GraphSpec, files: dict[str, FileSpec]) -> JournalEntry:
    """A finished graph, in the journal."""
    entry = JournalEntry(graph=graph, files=files)
    with (inputs.out / JOURNAL).open("ab") as journal:
        journal.write(msgspec.json.encode(entry) + b"\n")
    return entry


def _describe(graph: GraphSpec) -> str:
    certificate = graph.certificate
    assert certificate is not None
    rounding = "" if certificate.rounding is None else f", rounding {certificate.rounding:.1e}"
    checks = f"{len(certificate.cases)} checks, worst error {certificate.worst:.1e}{rounding}"
    kernels = f", {graph.kernels.described}" if graph.kernels else ""
    return f"{graph.name:>20}  {checks}, {graph.cost_ms:.2f} ms{kernels}"
