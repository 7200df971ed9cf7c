"""Single operators and small graphs in onnxruntime, for measurements of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

CONTRIB = "com.microsoft"


def opened(
    nodes: Iterable[NodeProto],
    inputs: Iterable[ValueInfoProto],
    outputs: Iterable[ValueInfoProto],
    constants: Iterable[TensorProto] = (),
    *,
    threads: int,
    spin_us: int = 0,
    optimised: bool = True,
) -> ort.InferenceSession:
    """`spin_us`: how long a core waits in a loop for the next operator; `optimised`: onnxruntime may join operators."""
    graph = helper.make_graph([*nodes], "kernels", [*inputs], [*outputs], [*constants])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin_us > 0)))
    if spin_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound(
    session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> Callable[[], object]:
    """Runs the session on these very arrays, which have to live as long; one may be input and output."""
    binding = session.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return lambda: session.run_with_iobinding(binding)
