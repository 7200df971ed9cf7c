"""Unsigned weights: signed bytes as unsigned ones around 128, for processors that multiply unsigned by signed bytes wrong.

x86 processors without VNNI add such products in 16 bits, two at a time, and saturate. Their products of unsigned by
unsigned bytes are exact and about four fifths as fast. onnxruntime can make weights unsigned when it opens a session
(PRECISE), once for each session (and not where two products of a graph share a weight, as none of ours does); where packed
weights are shared, they are made unsigned once, before they are packed.
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

# "1" makes weights unsigned on every x86 processor whose kernels for signed and unsigned weights differ, those with VNNI among
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
def saturates() -> bool:
    """Whether this processor's kernels saturate at 2 * 255 * 127: those for one row, or those for several."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    sums = [np.asarray(session.run(None, {"x": np.full((rows, 2), 255, np.uint8)})[0]) for rows in (1, 8)]
    return any((each != 2 * 255 * 127).any() for each in sums)


def entries() -> dict[str, str]:
    """Session entries that this processor needs for exact products of bytes."""
    return {PRECISE: "1"} if saturates() else {}


def make_unsigned(model: onnx.ModelProto) -> dict[str, set[tuple[int, int]]]:
    """Change products of a model to unsigned weights, under names of their own, in files that `write` makes.

    Returns the byte ranges that these files must hold: by the name of the file of the signed ones, offsets and lengths.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    signed = (tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT8 and tensor.external_data)
    weights = {tensor.name: tensor for tensor in signed}
    unsigned: dict[str, onnx.TensorProto] = {}
    ranges: dict[str, set[tuple[int, int]]] = {}
    for node in graph.node:
        if node.op_type != _PRODUCT or node.input[_WEIGHT] not in weights:
            continue
        tensor = weights[node.input[_WEIGHT]]
        if tensor.name not in unsigned:
            unsigned[tensor.name] = _unsigned_tensor(tensor, ranges)
        inputs = [*node.input[:_ZERO_POINT], _MIDDLE, *node.input[_ZERO_POINT + 1 :]]
        inputs[_WEIGHT] = unsigned[tensor.name].name
        del node.input[:]
        node.input.extend(inputs)
    if unsigned:
        used = {name for node in graph.node for name in node.input}
        others = [tensor for tensor in graph.initializer if tensor.name in used]
        middle = helper.make_tensor(_MIDDLE, TensorProto.UINT8, [], [128])
        del graph.initializer[:]
        graph.initializer.extend([*others, *unsigned.values(), middle])
    return ranges


def _unsigned_tensor(tensor: onnx.TensorProto, ranges: dict[str, set[tuple[int, int]]]) -> onnx.TensorProto:
    """The entry of a weight in unsigned bytes, which have the offset of the signed ones in a file of their own."""
    from onnx import TensorProto

    entry = {each.key: each.value for each in tensor.external_data}
    ranges.setdefault(entry["location"], set()).add((int(entry["offset"]), int(entry["length"])))
    other = TensorProto(name=tensor.name + SUFFIX, data_type=TensorProto.UINT8, dims=tensor.dims)
    other.data_location = TensorProto.EXTERNAL
    for key, text in (entry | {"location": entry["location"] + SUFFIX}).items():
        other.external_data.add(key=key, value=text)
    return other


def write(folder: Path, ranges: Mapping[str, Iterable[tuple[int, int]]]) -> None:
    """Write files of unsigned bytes, with holes, beside those in `folder` that have the signed ones."""
    for name, parts in ranges.items():
        with (folder / name).open("rb") as source, (folder / (name + SUFFIX)).open("wb") as target:
            for offset, length in sorted(parts):
                for position in range(offset, offset + length, _BLOCK):
                    source.seek(position)
                    target.seek(position)
                    block = np.frombuffer(source.read(min(_BLOCK, offset + length - position)), np.uint8)
                    target.write((block ^ 0x80).tobytes())
