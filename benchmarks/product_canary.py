"""Products inside a graph against the same kernels alone, on this processor; exit status 1 if the graph's are slow.

    python -m benchmarks.product_canary [--quants w8a8 ...] [--layers 22] [--runs 9] [--threads 2]

A model of random weights, 1B-shaped but for its number of layers, is compiled. Its graphs are opened as the runtime opens them.
The products of each graph are also extracted into a graph of their own, which onnxruntime opens with its own settings. Both
take turns with the profiler on, and only the kernels' own times count. So a session setting with an unexpected effect, or
packed weights that no session uses, show as a rate below 0.8. Memory is PSS beyond that of the process before, in a separate
process that has loaded the artifact and run all text graphs. The limit is 1.15 times the cache and the weights that these
graphs read completely.

The machine must be idle. The first turn does not count; a rate is the median of the quotients of two runs that followed each
other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import helper

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import GraphSpec, read_manifest
from staticvl.runtime.backends import ort
from staticvl.runtime.backends.base import new_feed
from staticvl.runtime.backends.cores import usable_cores
from staticvl.tools.machine import machine

from .onnx_session import CONTRIB
from .op_profile import MATMULS, profiled, weight_bytes
from .random_model import checkpoint_of

LEAST_RATE, MOST_MEMORY = 0.8, 1.15
QUANTS = ("none", "w8a16", "w8a8", "w4a16")
BUCKETS = Buckets(prefill=(256,), decode=(1, 8), vision=(1,), context=512, slots=8)

Event = dict[str, Any]


def times(events: list[Event], names: set[str]) -> list[float]:
    """Microseconds of the kernels of these nodes in each run of a session."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    nodes = [e for e in events if e["cat"] == "Node" and e["name"].removesuffix("_kernel_time") in names]
    return [math.fsum(e["dur"] for e in nodes if start <= e["ts"] < end) for start, end in runs]


def product_nodes(file: Path) -> dict[str, onnx.NodeProto]:
    """The products of a graph file that have a stored weight, by name."""
    graph = onnx.load(file, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.external_data}
    return {node.name: node for node in graph.node if node.op_type in MATMULS and node.input[1] in stored}


def shapes_of(events: list[Event], names: set[str]) -> dict[str, tuple[dict[str, list[int]], list[int]]]:
    """By the names of nodes, what each takes, {dtype: shape}, and the shape of what it puts out."""
    last = {e["name"].removesuffix("_kernel_time"): e["args"] for e in events if e["cat"] == "Node"}
    return {name: (last[name]["input_type_shape"][0], last[name]["output_type_shape"][0]["float"]) for name in names}


def alone(file: Path, events: list[Event], threads: int, prefix: Path) -> tuple[onnxruntime.InferenceSession, dict]:
    """A session of a graph's products and nothing else, each with an input of its own, and these inputs."""
    stored = onnx.load(file, load_external_data=False).graph.initializer
    nodes = product_nodes(file)
    random, inputs, feed, outputs = np.random.default_rng(0), [], {}, []
    for name, ((dtype, shape), out) in ((n, (*t.items(), o)) for n, (t, o) in shapes_of(events, set(nodes)).items()):
        values = random.integers(1, 256, shape, np.uint8) if dtype == "uint8" else random.standard_normal(shape, np.float32)
        nodes[name].input[0] = f"{name}.x"
        feed[f"{name}.x"] = values
        inputs.append(helper.make_tensor_value_info(f"{name}.x", helper.np_dtype_to_tensor_dtype(values.dtype), shape))
        outputs.append(helper.make_tensor_value_info(nodes[name].output[0], onnx.TensorProto.FLOAT, out))
    read = {name for node in nodes.values() for name in node.input}
    graph = helper.make_graph([*nodes.values()], "products", inputs, outputs, [each for each in stored if each.name in read])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid(CONTRIB, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(ort.WEIGHTS_FOLDER, str(file.parent))
    options.enable_profiling, options.profile_file_prefix = True, str(prefix)
    data = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]), feed


def events_of(session: onnxruntime.InferenceSession) -> list[Event]:
    return json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))


def rate(artifact: Path, graph: GraphSpec, runs: int, threads: int, folder: Path) -> dict[str, float]:
    """Milliseconds of the products of one graph, in it and alone, and the second divided by the first."""
    file, names, feed = artifact / graph.file, set(product_nodes(artifact / graph.file)), filled(graph)
    ((backend, session), (first, probe)) = [opened(artifact, graph, threads) for _ in range(2)]
    first.run(graph, feed)
    other, inputs = alone(file, events_of(probe), threads, folder / "alone")
    for _ in range(runs + 1):
        backend.run(graph, feed)
        other.run(None, inputs)
    inside, outside = (times(events_of(each), names)[1:] for each in (session, other))
    quotients = [b / a for a, b in zip(inside, outside, strict=True)]
    ms = {"ms": statistics.median(inside) / 1e3, "alone_ms": statistics.median(outside) / 1e3}
    return {name: round(value, 3) for name, value in {**ms, "rate": statistics.median(quotients)}.items()}


def opened(artifact: Path, graph: GraphSpec, threads: int) -> tuple[ort.OrtBackend, onnxruntime.InferenceSession]:
    """Open a graph as the runtime does; call within `profiled`."""
    backend = runtime.load(artifact, threads=threads).engine.backend
    assert isinstance(backend, ort.OrtBackend)
    backend.load(graph)
    return backend, backend.sessions[graph.file]


def filled(graph: GraphSpec) -> dict[str, np.ndarray]:
    """Inputs of a graph; rows of a decode graph follow 64 tokens."""
    feed = new_feed(graph)
    if graph.kind == "decode":
        feed["lengths"][:] = 64
    return feed


def memory(artifact: Path, threads: int) -> dict[str, float]:
    """What a process takes that runs all graphs but those for images, against weights and cache."""
    process = psutil.Process()
    before = process.memory_full_info().pss
    model = runtime.load(artifact, threads=threads)
    manifest = model.artifact.manifest
    for graph in manifest.graphs:
        if graph.kind != "vision":
            model.engine.backend.run(graph, filled(graph))
    for cache in model.engine.backend.caches.values():  # as when every slot is full
        cache.fill(0)
    weights = max(sum(weight_bytes(artifact / graph.file).values()) for graph in manifest.graphs if graph.kind != "vision")
    needs = weights + manifest.cache.nbytes
    pss = process.memory_full_info().pss - before
    return {"mb": round(pss / 1e6, 1), "weights_and_cache_mb": round(needs / 1e6, 1), "ratio": round(pss / needs, 3)}


def measure(checkpoint: Path, folder: Path, quant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of all text graphs of one quantisation, and its memory."""
    from .peers.build import build_for_timing  # torch, which the process whose memory counts does without

    artifact = folder / quant
    build_for_timing(checkpoint, artifact, quant, BUCKETS)
    runtime.load(artifact, threads=args.threads).close()  # packs weights, which is done once for a machine
    command = [sys.executable, "-m", "benchmarks.product_canary", "--memory", artifact, "--threads", args.threads]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    graphs = [graph for graph in read_manifest(artifact).graphs if graph.kind != "vision"]
    with profiled(folder):
        rates = {graph.name: rate(artifact, graph, args.runs, args.threads, folder) for graph in graphs}
    return {"graphs": rates, "memory": json.loads(done.stdout.splitlines()[-1])}


def faults(sides: dict[str, dict[str, Any]]) -> list[str]:
    """One sentence for each figure beyond its limit."""
    slow = [
        f"{quant} {name}: products run at {each['rate']} of their rate alone; expected at least {LEAST_RATE}"
        for quant, side in sides.items()
        for name, each in side["graphs"].items()
        if each["rate"] < LEAST_RATE
    ]
    large = [
        f"{quant}: memory is {side['memory']['ratio']} times weights and cache; expected at most {MOST_MEMORY}"
        for quant, side in sides.items()
        if side["memory"]["ratio"] > MOST_MEMORY
    ]
    return slow + large


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quants", nargs="+", default=QUANTS, help="formats to measure")
    parser.add_argument("--layers", type=int, default=22, help="layers of the decoder; a few are enough for rates; default: 22")
    parser.add_argument("--runs", type=int, default=9, help="runs of each side in a turn; default: 9")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory, args.threads)))
        return 0
    sides = {}
    with tempfile.TemporaryDirectory(prefix="staticvl-canary-") as name:
        checkpoint = checkpoint_of(args.layers, Path(name) / "checkpoint")
        for quant in args.quants:
            sides[quant] = measure(checkpoint, Path(name), quant, args)
            print(quant, json.dumps(sides[quant]), flush=True)
    for fault in faults(sides):
        print(fault)
    print(json.dumps({"machine": machine(), **sides}))
    return 1 if faults(sides) else 0


if __name__ == "__main__":
    sys.exit(main())
