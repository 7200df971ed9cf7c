"""The graph of a stage, as its definition has it -> as the stage's ranks run it.

To a definition, and to whoever checks it, what a stage takes from the one before is an input and what it hands on an output.
When the stages run together both lie in buffers and the ways between them are steps. Tokens go in and logits come out at the
first stage, so whoever leads its ranks sees a model like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..model_defs.config import Stage
from ..runtime.artifact import GraphSpec, Step, TensorSpec, Transfer, is_cached

RECEIVED = ("hidden", "features")  # graph inputs that another stage makes
HANDED_ON = ("next_hidden", "next_features")  # graph outputs that another stage takes


def joined(graph: GraphSpec, stage: Stage, fed: Sequence[TensorSpec], vocab_size: int) -> GraphSpec:
    """A graph of one stage with the steps that join it to the others.

    `fed`: all that a run is fed. Every stage's graph has it among its inputs, whatever its segments take, so that one feed
    serves all.
    """
    if stage.count == 1:
        return graph
    received = [spec for spec in graph.inputs if spec.name in RECEIVED]
    handed_on = [spec for spec in graph.outputs if spec.name in HANDED_ON]
    before = [Transfer(op="receive", stage=stage.index - 1, name=spec.name) for spec in received]
    after: list[Step] = [Transfer(op="send", stage=stage.index + 1, name=spec.name) for spec in handed_on]
    inputs = (*fed, *(spec for spec in graph.inputs if is_cached(spec.name)))
    outputs, buffers = graph.outputs, [*(graph.buffers or ()), *received]
    if graph.kind != "vision" and stage.first:
        rows = handed_on[0].shape[1 if graph.kind == "verify" else 0]
        logits = TensorSpec(name="logits", dtype="float32", shape=(rows, vocab_size))
        outputs, buffers = (logits, *outputs[1:]), [*buffers, *handed_on]
        after.append(Transfer(op="receive", stage=stage.count - 1, name="logits"))
    elif graph.kind != "vision" and stage.last:
        after.append(Transfer(op="send", stage=0, name="logits"))
    return msgspec.structs.replace(
        graph, inputs=inputs, outputs=outputs, buffers=tuple(buffers), steps=(*before, *graph.plan, *after)
    )
