"""A traced definition that passes over its graph may change before it is lowered."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, fx

from ..graphs import GraphDef, trace


@dataclass(frozen=True, slots=True, eq=False)
class TracedGraph:
    """A copy of a definition's trace: calls of the op vocabulary and a few of aten's.

    `parameters` names the placeholders that are parameters; the rest are the definition's inputs, in their order. `tensors` are
    the named parameters, without data. A pass that changes placeholders changes both. `quant` is the artifact's quantisation.
    `biases` names those that are added within a product.
    """

    module: fx.GraphModule
    parameters: dict[fx.Node, str]
    tensors: dict[str, Tensor]
    quant: str = "none"
    biases: set[str] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in the order in which the graph takes them."""
        return [self.parameters[node] for node in self.graph.nodes if node in self.parameters]


Rewrite = Callable[[TracedGraph], None]


def traced(definition: GraphDef, rewrites: tuple[Rewrite, ...]) -> TracedGraph:
    """The trace of a definition after `rewrites`, each of which changes the graph in place."""
    program = trace(definition)
    graph = copy.deepcopy(program.graph)  # the trace has other users
    parameters = dict(zip(graph.nodes, program.parameters.values(), strict=False))  # they are the first placeholders
    traced = TracedGraph(fx.GraphModule({}, graph), parameters, dict(definition.module.named_parameters()), definition.quant)
    for rewrite in rewrites:
        rewrite(traced)
        traced.graph.eliminate_dead_code()  # what a pass has replaced, and all that only this read
    traced.graph.lint()
    traced.module.recompile()
    return traced
