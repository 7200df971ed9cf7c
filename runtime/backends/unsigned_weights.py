"""Weights in signed bytes as unsigned ones around 128, for processors that multiply unsigned by signed bytes wrong.

x86 processors without VNNI add such products in 16 bits, two at a time, and cut off what is more. Their products of unsigned by
unsigned bytes are exact and about four fifths as fast. onnxruntime can be told to turn weights over when it opens a session
(PRECISE), each session for itself (and no weight of two products in one graph, which no graph of ours has); where packed
weights are shared, they are turned over once, before they are packed.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    import onnx

# "1" turns weights over on every x86 processor whose kernels for signed and unsigned weights differ, those with VNNI among
# them: products take two to three times as long there, and no session uses packed weights that are shared.
PRECISE = "session.x64quantprecision"
SUFFIX = ".unsigned"
_PRODUCT = "MatMulIntegerToFloat"
_WEIGHT, _ZERO_POINT = 1, 5  # places among its inputs
_MIDDLE = f"middle{SUFFIX}"
_BLOCK = 1 << 22


# A model of one MatMulInteger: x [m, 2] in uint8 times the int8 weight [[127], [127]]. Bytes, so that the probe needs no onnx.
PROBE = base64.b64decode(
    "CAo6WAoYCgF4CgF3EgF5Ig1NYXRNdWxJbnRlZ2VyEgFnKg0IAggBEANCAXdKAn9/WhQKAXgSDwoNCAISCQoDEgFtCgIIAmIUCgF5Eg8KDQgGEgkKAxIBbQoCCAFC"
    "BAoAEA0="
)


@functools.cache
def cuts_off() -> bool:
    """Whether this processor's kernels get 2 * 255 * 127 wrong: those for one row, and those for several."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    sums = [np.asarray(session.run(None, {"x": np.full((rows, 2), 255, np.uint8)})[0]) for rows in (1, 8)]
    return any((each != 2 * 255 * 127).any() for each in sums)


def entries() -> dict[str, str]:
    """Session entries that this processor needs for exact products of bytes."""
    return {PRECISE: "1"} if cuts_off() else {}


def turn_over(model: onnx.ModelProto) -> dict[str, set[tuple[int, int]]]:
    """Let products take unsigned weights, under names of their own, from files that `write` makes.

    Returns which bytes these files have to hold: by the name of the file that has the signed ones, offsets and lengths.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    signed = (tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.external_data)
    stored = {tensor.name: tensor for tensor in signed}
    turned: dict[str, onnx.TensorProto] = {}
    needed: dict[str, set[tuple[int, int]]] = {}
    for node in graph.node:
        if node.op_type != _PRODUCT or node.input[_WEIGHT] not in stored:
            continue
        tensor = stored[node.input[_WEIGHT]]
        if tensor.name not in turned:
            turned[tensor.name] = _turned(tensor, needed)
        inputs = [*node.input[:_ZERO_POINT], _MIDDLE, *node.input[_ZERO_POINT + 1 :]]
        inputs[_WEIGHT] = turned[tensor.name].name
        del node.input[:]
        node.input.extend(inputs)
    if turned:
        read = {name for node in graph.node for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        middle = helper.make_tensor(_MIDDLE, TensorProto.UINT8, [], [128])
        del graph.initializer[:]
        graph.initializer.extend([*kept, *turned.values(), middle])
    return needed


def _turned(tensor: onnx.TensorProto, needed: dict[str, set[tuple[int, int]]]) -> onnx.TensorProto:
    """The same weight's entry for unsigned bytes, which lie where the signed ones do in their own file."""
    from onnx import TensorProto

    entry = {each.key: each.value for each in tensor.external_data}
    needed.setdefault(entry["location"], set()).add((int(entry["offset"]), int(entry["length"])))
    other = TensorProto(name=tensor.name + SUFFIX, data_type=TensorProto.UINT8, dims=tensor.dims)
    other.data_location = TensorProto.EXTERNAL
    for key, text in (entry | {"location": entry["location"] + SUFFIX}).items():
        other.external_data.add(key=key, value=text)
    return other


def write(folder: Path, needed: Mapping[str, Iterable[tuple[int, int]]]) -> None:
    """Files with holes beside those in `folder` that have the signed bytes."""
    for name, parts in needed.items():
        with (folder / name).open("rb") as source, (folder / (name + SUFFIX)).open("wb") as target:
            for offset, length in sorted(parts):
                for at in range(offset, offset + length, _BLOCK):
                    source.seek(at)
                    target.seek(at)
                    block = np.frombuffer(source.read(min(_BLOCK, offset + length - at)), np.uint8)
                    target.write((block ^ 0x80).tobytes())
