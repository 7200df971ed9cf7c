"""The graph of a pipeline stage: its definition -> the graph that the stage's ranks run.

In a definition, and where it is checked, tensors from the stage before are inputs and those for the stage after are outputs.
When the stages run together they lie in buffers, and sending and receiving them are steps. Tokens go in and logits come out at
the first stage, so the leader of its ranks sees a model like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..model_defs.config import Stage
from ..runtime.artifact import GraphSpec, Step, TensorSpec, Transfer, is_cached

RECEIVED = ("hidden", "features")  # graph inputs that another stage computes
SENT = ("next_hidden", "next_features")  # graph outputs that another stage takes


def joined(graph: GraphSpec, stage: Stage, inputs: Sequence[TensorSpec], vocab_size: int) -> GraphSpec:
    """A graph of one stage with the steps that join it to the others.

    `inputs`: those of the whole model but caches (graphs.fed_inputs). Every stage's graph has all of them,
    so that one feed serves all stages.
    """
    if stage.count == 1:
        return graph
    received = [spec for spec in graph.inputs if spec.name in RECEIVED]
    sent = [spec for spec in graph.outputs if spec.name in SENT]
    before = [Transfer(op="receive", stage=stage.index - 1, name=spec.name) for spec in received]
    after: list[Step] = [Transfer(op="send", stage=stage.index + 1, name=spec.name) for spec in sent]
    inputs = (*inputs, *(spec for spec in graph.inputs if is_cached(spec.name)))
    outputs, buffers = graph.outputs, [*(graph.buffers or ()), *received]
    if graph.kind != "vision" and stage.first:
        rows = sent[0].shape[1 if graph.kind == "verify" else 0]
        logits = TensorSpec(name="logits", dtype="float32", shape=(rows, vocab_size))
        outputs, buffers = (logits, *outputs[1:]), [*buffers, *sent]
        after.append(Transfer(op="receive", stage=stage.count - 1, name="logits"))
    elif graph.kind != "vision" and stage.last:
        after.append(Transfer(op="send", stage=0, name="logits"))
    return msgspec.structs.replace(
        graph, inputs=inputs, outputs=outputs, buffers=tuple(buffers), steps=(*before, *graph.plan, *after)
    )
