"""Looking into an ONNX graph: a copy that also puts out every value which its definition names.

Values are found by the module and the place within it, not by their names alone: the compiler numbers the operators of a whole
graph, and one that is missing would shift every name behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import helper
from torch.fx import Node

from ..runtime.artifact import TensorSpec, WeightSpec
from .emit_onnx import _DTYPES, emitted_values
from .graphs import GraphDef

TAP = "tap."  # and the number of the file, and of the tap
Place = tuple[str, str, int, int]  # module, operator, which of these, which output


@dataclass(frozen=True, slots=True, eq=False)
class Tapped:
    """One file with taps: outputs of their own, by the traced nodes whose values they are."""

    data: bytes
    taps: dict[Node, TensorSpec]


def tap(graph: GraphDef, weights: dict[str, WeightSpec], files: Iterable[bytes]) -> list[Tapped]:
    """The files of a compiled `graph`, in order, with a tap for every value of the definition that they hold.

    `weights` are those that the graph's files refer to. Values that leave a file under a name of the graph are not tapped.
    """
    found = []
    for values, data in zip(emitted_values(graph, weights), files, strict=True):
        model = onnx.load_from_string(data)
        expected, there = _places(values.nodes), _places(model.graph.node)
        by_place = {place: name for name, place in there.items()}
        given = {each.name for each in (*model.graph.input, *model.graph.output)}
        taps: dict[Node, TensorSpec] = {}
        prefix = f"{TAP}{len(found)}."
        for node, name in values.names.items():
            name = values.outputs.get(name, name)
            actual = name if name in given else by_place.get(expected[name]) if name in expected else None
            if actual is None:
                continue
            spec = _spec(node, f"{prefix}{len(taps)}")
            model.graph.node.append(helper.make_node("Identity", [actual], [spec.name], name=spec.name))
            model.graph.output.append(helper.make_tensor_value_info(spec.name, _DTYPES[spec.dtype], spec.shape))
            taps[node] = spec
        found.append(Tapped(model.SerializeToString(), taps))
    return found


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


def _spec(node: Node, name: str) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape))
