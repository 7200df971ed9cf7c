"""Time of a prefill chunk and of a decode step, by operator and by weight.

    python -m benchmarks.op_profile ARTIFACT [--prompt 512] [--steps 16] [--threads 2]

The artifact's own graphs run in onnxruntime with its profiler on, which costs a few microseconds a node. Figures are medians
over the runs of a graph, in milliseconds. Bytes are those of the weights that a node reads, as the artifact stores them. Gop/s
counts a multiplication and an addition as two operations. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks.bandwidth import read_gb_per_s
from staticvl import runtime
from staticvl.runtime.artifact import GraphSpec
from staticvl.runtime.backends import ort
from staticvl.runtime.backends.cores import usable_cores
from tests.fakes import text_prompt

MATMULS = ("MatMul", "FusedMatMul", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


@contextmanager
def profiled(folder: Path) -> Iterator[None]:
    """Sessions that the backend opens within write what they did into `folder`."""
    plain = ort._options

    def with_profile(**settings: Any) -> onnxruntime.SessionOptions:
        options = plain(**settings)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "run")
        return options

    ort._options = with_profile
    try:
        yield
    finally:
        ort._options = plain


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of weights that each node of a graph file reads; a gather reads rows, which count as nothing."""
    graph = onnx.load(path, load_external_data=False).graph
    size = {
        t.name: int(next(e.value for e in t.external_data if e.key == "length")) for t in graph.initializer if t.external_data
    }
    return {node.name: sum(size.get(name, 0) for name in node.input) for node in graph.node if node.op_type != "Gather"}


def weight_entries(path: Path) -> dict[str, int]:
    """Entries N * K of the weight matrix of each matrix product, packed or not."""
    graph = onnx.load(path, load_external_data=False).graph
    sizes = {t.name: math.prod(t.dims) for t in graph.initializer if len(t.dims) == 2}
    counts = {}
    for node in graph.node:
        packed = {a.name: a.i for a in node.attribute if a.name in ("K", "N")}
        counts[node.name] = (
            math.prod(packed.values()) if packed else max((sizes.get(each, 0) for each in node.input), default=0)
        )
    return counts


def _rows(event: dict[str, Any]) -> int:
    """Output rows of a matrix product."""
    (shape,) = event["args"]["output_type_shape"][0].values()
    return math.prod(shape[:-1])


def summary(events: list[dict[str, Any]], nbytes: dict[str, int], entries: dict[str, int]) -> dict[str, Any]:
    """Medians over the runs of a graph, the first left out: {run_ms, by_op: {...}, by_weight: {...}}."""
    starts = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[1:]
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    calls: dict[str, int] = defaultdict(int)
    read: dict[str, int] = defaultdict(int)
    done: dict[str, int] = defaultdict(int)  # multiplications and additions
    for number, (start, end) in enumerate(starts):
        ops: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for e in kernels:
            if start <= e["ts"] < end:
                op, node = e["args"]["op_name"], e["name"].removesuffix("_kernel_time")
                place = re.sub(r"\.\d+\.", ".*.", node.rsplit("/", 1)[0])
                ops[op] += e["dur"]
                if op in MATMULS:
                    weights[place] += e["dur"]
                if number == 0:
                    calls[op] += 1
                    for name in (op, place) if op in MATMULS else (op,):
                        read[name] += nbytes.get(node, 0)
                        done[name] += 2 * entries.get(node, 0) * _rows(e) if op in MATMULS else 0
        runs.append((ops, weights))

    def table(which: int) -> dict[str, dict[str, float]]:
        names = {name for run in runs for name in run[which]}
        times = {name: statistics.median(run[which].get(name, 0) for run in runs) for name in names}
        return {
            name: {
                "ms": round(us / 1e3, 3),
                "mb": round(read[name] / 1e6, 1),
                "gb_per_s": round(read[name] / max(us, 1) / 1e3, 1),
                "gop_per_s": round(done[name] / max(us, 1) / 1e3, 1),
                **({"calls": calls[name]} if which == 0 else {}),
            }
            for name, us in sorted(times.items(), key=lambda item: -item[1])
        }

    wall = statistics.median(end - start for start, end in starts) / 1e3
    return {"run_ms": round(wall, 2), "runs": len(starts), "by_op": table(0), "by_weight": table(1)}


def measure(artifact: Path, prompt: int, steps: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="staticvl-profile-") as name:
        runtime.load(artifact, threads=threads).close()  # packs the weights, so that no profile has that
        with profiled(Path(name)):
            model = runtime.load(artifact, threads=threads, reuse=False)
            rng = np.random.default_rng(0)
            params = runtime.SamplingParams(max_new_tokens=steps + 2, temperature=0.0, ignore_eos=True)
            for length in (prompt, prompt, prompt, prompt, 64):
                tokens = rng.integers(3, model.info.tokenizer.used, length)
                once = params if length == 64 else runtime.SamplingParams(max_new_tokens=1, temperature=0.0)
                model.run([model.engine.new_sequence(text_prompt(*map(int, tokens)), once)])
            backend = model.engine.backend
            assert isinstance(backend, ort.OrtBackend)
            graphs = {
                graph.name: read_profile(artifact, graph, backend.sessions[graph.file].end_profiling())
                for graph in model.artifact.manifest.graphs
                if graph.file in backend.sessions and graph.bucket in (1, prompt)
            }
            model.close()
    return graphs


def read_profile(artifact: Path, graph: GraphSpec, path: str) -> dict[str, Any]:
    return summary(
        json.loads(Path(path).read_text(encoding="utf-8")),
        weight_bytes(artifact / graph.file),
        weight_entries(artifact / graph.file),
    )


def show(console: Console, title: str, rows: dict[str, dict[str, float]], bound: float) -> None:
    result = Table(title=title)
    for column in ("", "ms", "share", "calls", "MB of weights", "GB/s", "of the machine's", "Gop/s"):
        result.add_column(column, justify="right")
    total = math.fsum(row["ms"] for row in rows.values())
    for name, row in rows.items():
        speed = (f"{row['gb_per_s']:.1f}", f"{row['gb_per_s'] / bound:.0%}") if row["mb"] else ("", "")
        work = f"{row['gop_per_s']:.0f}" if row["gop_per_s"] else ""
        calls = str(row["calls"]) if "calls" in row else ""
        result.add_row(name, f"{row['ms']:.2f}", f"{row['ms'] / total:.1%}", calls, f"{row['mb']:.1f}", *speed, work)
    console.print(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact for ONNX Runtime")
    parser.add_argument(
        "--prompt", type=int, default=512, help="tokens of a prompt; one of the artifact's prefill buckets; default: 512"
    )
    parser.add_argument("--steps", type=int, default=16, help="decode steps; default: 16")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    args = parser.parse_args()
    console = Console(highlight=False, width=150)
    bound = read_gb_per_s(args.threads)
    graphs = measure(args.artifact, args.prompt, args.steps, args.threads)
    for name, graph in graphs.items():
        console.print(
            f"{args.artifact.name}, {name}: {graph['run_ms']} ms a run, median of {graph['runs']}; "
            f"the machine reads {bound:.1f} GB/s"
        )
        show(console, "by operator", graph["by_op"], bound)
        show(console, "matrix products by place", graph["by_weight"], bound)
    print(json.dumps({"artifact": args.artifact.name, "read_gb_per_s": round(bound, 1), "graphs": graphs}))


if __name__ == "__main__":
    main()
