"""A traced graph of one rank -> segments with collectives between them, for devices that have no collectives.

The graph is cut at every staticvl::all_reduce and all_gather. A value that is needed after the next cut becomes a buffer,
and buffers of one dtype and shape are shared by values whose lives do not overlap: a value lives from the step that makes it to
the last that reads it, both included, since a segment may write its outputs while it still reads its inputs. Only a sum may
overwrite its input. Outputs of the graph have memory of their own.

Values computed from weights alone are computed in every segment that uses them, so that no weight is ever a buffer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor
from torch.fx import Node

from ..model_defs.ops import COLLECTIVES, NAMESPACE
from ..runtime.artifact import Collective, TensorSpec
from .graphs import GraphDef
from .tracing import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The nodes of one segment in order, and the tensors that enter and leave it."""

    nodes: tuple[Node, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    entering: dict[Node, str]  # by the names of `inputs`
    leaving: tuple[Node, ...]  # in the order of `outputs`


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A graph in steps; one without collectives is one part."""

    steps: tuple[Part | Collective, ...]
    buffers: tuple[TensorSpec, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(step for step in self.steps if isinstance(step, Part))


def cut(graph: GraphDef, program: Trace) -> Cut:
    """Cut a graph, of which `program` is the trace, at its collectives."""
    return _Cutter(graph, program).cut()


@dataclass(slots=True)
class _Draft:
    """A step while the graph is walked: one collective, or the nodes between two."""

    nodes: list[Node] = field(default_factory=list)
    collective: bool = False


class _Cutter:
    def __init__(self, graph: GraphDef, program: Trace) -> None:
        self.graph = graph
        self.inputs = dict(zip(program.inputs, graph.inputs, strict=True))
        self.calls = [node for node in program.graph.nodes if node.op == "call_function"]
        self.outputs = dict(zip(program.outputs, graph.outputs, strict=True))
        assert len(self.outputs) == len(graph.outputs), f"{graph.name}: a value is two outputs"
        self.of_weights = self._made_of_weights()
        self.drafts = self._draft()
        self.step = {node: i for i, draft in enumerate(self.drafts) for node in draft.nodes}
        self.order = {node: i for i, node in enumerate(self.calls)}

    def cut(self) -> Cut:
        if not any(draft.collective for draft in self.drafts):
            names = {node: spec.name for node, spec in self.inputs.items()}
            part = Part(tuple(self.calls), self.graph.inputs, self.graph.outputs, names, tuple(self.outputs))
            return Cut((part,), ())
        specs, buffers = self._place()
        return Cut(tuple(self._finish(draft, specs) for draft in self.drafts), buffers)

    def _made_of_weights(self) -> set[Node]:
        """Calls that depend on no input of the graph, except results that ranks exchange or the graph returns."""
        of_weights: set[Node] = set()
        for node in self.calls:
            bound = node in self.outputs or _collective(node) or any(map(_collective, node.users))
            if not bound and not any(self._varies(each, of_weights) for each in node.all_input_nodes):
                of_weights.add(node)
        return of_weights

    def _varies(self, node: Node, of_weights: Collection[Node]) -> bool:
        return node in self.inputs or (node.op == "call_function" and node not in of_weights)

    def _draft(self) -> list[_Draft]:
        """Every call but those of weights alone, by step; items of a tuple stay with the call that made it."""
        drafts = [_Draft()]
        step: dict[Node, _Draft] = {}
        for node in self.calls:
            if node in self.of_weights:
                continue
            if _collective(node):
                drafts += [_Draft([node], collective=True), _Draft()]
                step[node] = drafts[-2]
                continue
            step[node] = step[node.all_input_nodes[0]] if _is_item(node) else drafts[-1]
            step[node].nodes.append(node)
        return [draft for draft in drafts if draft.nodes]

    def _uses(self, node: Node) -> list[int]:
        """The steps that read what `node` made, other than its own."""
        return sorted({self.step[user] for user in node.users if user in self.step and self.step[user] != self.step[node]})

    def _place(self) -> tuple[dict[Node, TensorSpec], tuple[TensorSpec, ...]]:
        """The buffer of every value that leaves its step, and all buffers."""
        specs, buffers = self.inputs | self.outputs, []
        free_from: list[int] = []  # by buffer: the first step that may write it
        place: dict[Node, int] = {}
        for i, draft in enumerate(self.drafts):
            for node in draft.nodes:
                uses = self._uses(node)
                if node in self.outputs or not (uses or draft.collective):
                    continue
                at = self._reused(node, i, place) if draft.collective else None
                if at is None:
                    at = next((j for j, b in enumerate(buffers) if free_from[j] <= i and _fits(node, b)), None)
                if at is None:
                    at = len(buffers)
                    buffers.append(_spec(node, f"buffer.{at}"))
                    free_from.append(0)
                place[node], specs[node] = at, buffers[at]
                free_from[at] = max(uses, default=i) + 1
        return specs, tuple(buffers)

    def _reused(self, node: Node, step: int, place: dict[Node, int]) -> int | None:
        """The buffer of the input of a sum, if no later step reads it."""
        source = node.all_input_nodes[0]
        if _op(node) != "all_reduce" or source not in place or max(self._uses(source)) > step:
            return None
        return place[source]

    def _finish(self, draft: _Draft, specs: dict[Node, TensorSpec]) -> Part | Collective:
        if draft.collective:
            (node,) = draft.nodes
            source, ranks = cast(tuple[Node, int], node.args)
            op = "all_reduce" if _op(node) == "all_reduce" else "all_gather"
            return Collective(op=op, ranks=ranks, reads=specs[source].name, writes=specs[node].name)
        nodes = sorted({*draft.nodes, *self._weights_for(draft.nodes)}, key=self.order.__getitem__)
        own = set(nodes)
        entering = {
            each: specs[each] for node in nodes for each in node.all_input_nodes if each not in own and self._varies(each, ())
        }
        leaving = [node for node in draft.nodes if node in self.outputs or self._uses(node)]
        inputs, outputs = tuple(entering.values()), tuple(specs[node] for node in leaving)
        names = [spec.name for spec in (*inputs, *outputs)]
        assert len(set(names)) == len(names), names
        return Part(tuple(nodes), inputs, outputs, {node: spec.name for node, spec in entering.items()}, tuple(leaving))

    def _weights_for(self, nodes: Collection[Node]) -> Iterator[Node]:
        for node in nodes:
            inputs = [each for each in node.all_input_nodes if each in self.of_weights]
            yield from inputs
            yield from self._weights_for(inputs)


def _op(node: Node) -> str:
    return str(node.target).removesuffix(".default").removeprefix(f"{NAMESPACE}.")


def _collective(node: Node) -> bool:
    return node.op == "call_function" and _op(node) in COLLECTIVES


def _is_item(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _spec(node: Node, name: str) -> TensorSpec:
    value: Tensor = node.meta["val"]
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape))


def _fits(node: Node, buffer: TensorSpec) -> bool:
    return _spec(node, buffer.name) == buffer
