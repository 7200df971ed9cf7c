"""The emitter that lowerings write into, nodes and initializers of one ONNX graph, and the table of lowerings by op name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch.fx import Node

from ...runtime.artifact import Kernels, TensorSpec, WeightSpec

CONTRIB = "com.microsoft"
DTYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
NARROW = ("float16", "bfloat16")
DEFAULT_KERNELS = Kernels()


class Emitter:
    """Collects the nodes and initializers of one ONNX graph while the traced nodes are lowered in order."""

    def __init__(
        self,
        weights: Mapping[str, WeightSpec],
        constants: Mapping[str, np.ndarray],
        kernels: Kernels = DEFAULT_KERNELS,
        *,
        exact: bool = False,
    ) -> None:
        self.weights, self.constants, self.kernels, self.exact = weights, constants, kernels, exact
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.narrow: dict[str, tuple[WeightSpec, tuple[int, ...]]] = {}  # weights in 16 bits and their shapes, by alias
        self.between: list[TensorSpec] = []  # further outputs: caches after a piece of a chunk
        self.names: dict[Node, Any] = {}  # traced node -> ONNX value name, or a tuple of names
        self.memo: dict[tuple, Any] = {}
        self.scope = ""
        self.count = 0

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        *,
        domain: str = "",
        outputs: int = 1,
        names: Sequence[str] = (),
        **attributes: Any,
    ) -> Any:
        """Add one node; returns its output name, or a tuple of them. `names`: of the last outputs."""
        self.count += 1
        base = f"{self.scope}/{op}_{self.count}"
        results = (*(f"{base}:{i}" for i in range(outputs - len(names))), *names)
        self.nodes.append(helper.make_node(op, list(inputs), list(results), name=base, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """The value under `key`, made at its first use, so that a value that all layers need is computed once."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """A small inline constant; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype)
        values = "_".join(map(str, array.ravel().tolist()))
        if array.size > 16:
            values = hashlib.sha256(values.encode()).hexdigest()[:16]
        name = f"const_{dtype}_{'x'.join(map(str, array.shape))}_{values}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, shape: Sequence[int] | None = None, *, packed: bool = False) -> str:
        """A weight by its name in the artifact, perhaps in another shape of the same bytes; `packed`: as numbers of 4 bits.

        One in 16 bits is only there once `rows` or `upcast` was called for it.
        """
        if name in self.constants:
            if name not in self.initializers:
                self.initializers[name] = numpy_helper.from_array(self.constants[name], name)
            return name
        spec = self.weights[name]
        shape = tuple(spec.shape if shape is None else shape)
        alias = name if shape == tuple(spec.shape) else f"{name}:{'x'.join(map(str, shape))}"
        if spec.dtype in NARROW:
            self.narrow[alias] = spec, shape
        elif alias not in self.initializers:
            self.initializers[alias] = _external(alias, shape, spec, TensorProto.UINT4 if packed else DTYPES[spec.dtype])
        return alias

    def rows(self, alias: str, first: int = 0, end: int | None = None) -> str:
        """Rows of a weight in 16 bits, as they are stored."""
        spec, shape = self.narrow[alias]
        end = shape[0] if end is None else end
        name = alias if end - first == shape[0] else f"{alias}[{first}:{end}]"
        if name not in self.initializers:
            row = spec.nbytes // shape[0]
            part = msgspec.structs.replace(spec, offset=spec.offset + first * row, nbytes=(end - first) * row)
            self.initializers[name] = _external(name, (end - first, *shape[1:]), part, DTYPES[spec.dtype])
        return name

    def upcast(self, value: Any) -> Any:
        """A value that is computed with: a weight in 16 bits as float32, anything else as it is."""
        return self.node("Cast", [self.rows(value)], to=TensorProto.FLOAT) if value in self.narrow else value

    def __getitem__(self, node: Any) -> str:
        return self.names[node]


def _external(name: str, shape: tuple[int, ...], spec: WeightSpec, dtype: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)  # type: ignore[arg-type]
    for key, value in (("location", spec.file), ("offset", spec.offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


Lowering = Callable[..., Any]
LOWERINGS: dict[str, Lowering] = {}
UPCASTING: set[str] = set()  # ops whose lowerings take weights in 16 bits as they are stored


def lowers(*ops: str, upcasts: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a lowering: called with the emitter, the traced node and its arguments (values as ONNX names)."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(ops, function))
        UPCASTING.update(ops if upcasts else ())
        return function

    return register


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def slice_along(e: Emitter, x: str, axis: int, start: int, end: int) -> str:
    return e.node("Slice", [x, e.constant([start]), e.constant([end]), e.constant([axis])])
