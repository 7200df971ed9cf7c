"""Taps: a copy of an ONNX graph that also outputs every value which its definition names.

Values are matched by the module and the place within it, not by their names alone: the compiler numbers the operators of a
whole graph, and one that is missing would shift every name after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import helper
from torch.fx import Node

from ..runtime.artifact import WeightSpec
from .emit_onnx import emitted_values
from .graphs import GraphDef
from .onnx_graph.emitter import DTYPES
from .tracing import Trace

TAP = "tap."  # and the number of the file, and of the tap
Place = tuple[str, str, int, int]  # module, operator, which of these, which output


@dataclass(frozen=True, slots=True, eq=False)
class Tapped:
    """One file with taps: names of outputs of their own, by the traced nodes whose values they are."""

    data: bytes
    taps: dict[Node, str]


def tap(graph: GraphDef, program: Trace, weights: Mapping[str, WeightSpec], files: Iterable[bytes]) -> list[Tapped]:
    """The files of a compiled `graph`, in order, with a tap for every value of its trace `program` that they hold.

    `weights` are those that the graph's files refer to. A file made of another definition may have another value in a
    place: its shape tells.
    """
    tapped = []
    for values, data in zip(emitted_values(graph, program, weights), files, strict=True):
        model = onnx.load_from_string(data)
        expected, there = _places(values.nodes), _places(model.graph.node)
        by_place = {place: name for name, place in there.items()}
        ends = {each.name for each in (*model.graph.input, *model.graph.output)}
        taps: dict[Node, str] = {}
        for node, emitted in values.names.items():
            name = values.outputs.get(emitted, emitted)
            actual = name if name in ends else by_place.get(expected[name]) if name in expected else None
            if actual is None:
                continue
            taps[node] = f"{TAP}{len(tapped)}.{len(taps)}"
            model.graph.node.append(helper.make_node("Identity", [actual], [taps[node]], name=taps[node]))
            dtype = DTYPES[str(node.meta["val"].dtype).removeprefix("torch.")]
            model.graph.output.append(helper.make_tensor_value_info(taps[node], dtype, None))
        tapped.append(Tapped(model.SerializeToString(), taps))
    return tapped


def _places(nodes: Iterable[onnx.NodeProto]) -> dict[str, Place]:
    """Value -> where it is made. An emitted node is named MODULE/OPERATOR_NUMBER."""
    counted: Counter[tuple[str, str]] = Counter()
    places = {}
    for node in nodes:
        key = node.name.rpartition("/")[0], node.op_type
        for i, output in enumerate(node.output):
            places[output] = (*key, counted[key], i)
        counted[key] += 1
    return places
