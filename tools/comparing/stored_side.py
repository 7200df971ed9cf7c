"""The definitions over the weights that an artifact stores: what its quantisation alone makes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from ...compiler.eager import EagerBackend
from ...compiler.graphs import GraphContext, define_graph
from ...runtime.artifact import Artifact, GraphSpec
from .localise import FailingCase
from .metrics import relative_error
from .sides import Side
from .static_side import StaticSide


def rounding_errors(side: Side, cases: Sequence[FailingCase], *, reference: bool) -> list[float] | None:
    """By case, how far a side's logits are from those of the definitions over the weights that it stores, over the largest
    magnitude; None where these cannot be run. `reference`: the side is the reference of the cases, else their candidate."""
    stored = open_stored_side(side) if isinstance(side, StaticSide) else None
    if stored is None:
        return None
    errors = []
    for case in cases:
        prompts, route = (case.reference, None) if reference else (case.candidate, case.route)
        pairs = zip(*(each.run_forced(prompts, case.answers, route=route) for each in (stored, side)), strict=True)
        errors.append(max(relative_error(a.logits, b.logits) for a, b in pairs))
    return errors


def open_stored_side(side: StaticSide) -> StaticSide | None:
    """The definitions over the stored weights of an artifact; None for several ranks, and without the sizes of the model."""
    manifest, config = side.artifact.manifest, side.config
    if config is None or manifest.ranks > 1:
        return None
    context = GraphContext(config=config, image=side.info.image, cache=manifest.cache, quant=manifest.quant)
    define = partial(define_graph, context)

    def defined(graph: GraphSpec) -> GraphSpec:
        return define(graph.graph_key).spec(graph.name, cost_ms=graph.cost_ms)

    graphs = tuple(map(defined, manifest.graphs))
    artifact = Artifact(side.artifact.folder, msgspec.structs.replace(manifest, backend="onnx", graphs=graphs))
    backend = EagerBackend(side.artifact.folder, manifest.weights, manifest.cache, define)
    return StaticSide(f"{side.name}, its definitions over the stored weights", artifact, backend, config, compiled=False)
