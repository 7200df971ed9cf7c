"""Memory and speed of one model, by the dtype of the weights that are not quantised.

    python -m benchmarks.studies.stored_floats [--layers 4] [--tower-layers 8] [--runs 7] [--threads 2]
        [--sides none none/float16 ...]

A side is QUANT/DTYPE, as for `staticvl compile`. The checkpoint is random, in bfloat16, 1B-shaped but for its number of layers.
Memory is PSS (shared pages count once) of a process that has loaded an artifact and run a chunk, a token and an image. Times
are medians of runs in which the sides take turns, relative to the first side. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.backends.base import new_feed

BUCKETS = Buckets(prefill=(512,), decode=(1,), vision=(1,), context=1024, slots=1)
SIDES = ("none/float32", "none/float16", "none/bfloat16", "w8a8/float32", "w8a8", "w8a8/float16", "w8a8/bfloat16")


class Side:
    """A loaded artifact."""

    def __init__(self, artifact: Path, threads: int) -> None:
        self.model = runtime.load(artifact, threads=threads)
        self.feeds = [(graph, new_feed(graph)) for graph in self.model.artifact.manifest.graphs]
        for graph, feed in self.feeds:
            if graph.kind == "decode":
                feed["lengths"][:] = 64

    def run(self) -> dict[str, float]:
        """Seconds of each graph, and seconds of processors, which depend less on what else the machine does."""
        seconds = {}
        for graph, feed in self.feeds:
            start, cpu_start = time.perf_counter(), time.process_time()
            self.model.engine.backend.run(graph, feed)
            seconds |= {graph.name: time.perf_counter() - start, f"{graph.name} cpu": time.process_time() - cpu_start}
        return seconds


def measure(artifact: Path, threads: int) -> dict[str, float]:
    """Memory in MB beyond what the process had before, every graph loaded and run."""
    process = psutil.Process()
    before = process.memory_full_info()
    side = Side(artifact, threads)
    for _ in range(3):
        side.run()
    after = process.memory_full_info()
    return {"pss_mb": round((after.pss - before.pss) / 1e6, 1), "uss_mb": round((after.uss - before.uss) / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder; default: 4")
    parser.add_argument("--tower-layers", type=int, default=8, help="layers of the vision tower; default: 8")
    parser.add_argument("--runs", type=int, default=7, help="turns of each side; default: 7")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default: 2")
    parser.add_argument("--sides", nargs="+", default=SIDES, help="sides QUANT/DTYPE")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.threads)))
        return
    with tempfile.TemporaryDirectory(prefix="staticvl-floats-") as name:
        print(json.dumps(compare(Path(name), args)))


def compare(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    from staticvl.tools.development.random_checkpoint import write_checkpoint

    from ..peers.build import build_for_timing  # torch, which the processes that are measured do without
    from ..random_model import SHAPE

    layers = {"text_config.num_hidden_layers": args.layers, "vision_config.num_hidden_layers": args.tower_layers}
    write_checkpoint(Path("llava-1.5-7b-hf"), folder / "checkpoint", dtype="bfloat16", overrides=SHAPE | layers)
    results: dict[str, dict[str, float]] = {}
    sides = {}
    for side in args.sides:
        artifact = folder / side.replace("/", "-")
        quant, _, dtype = side.partition("/")
        build_for_timing(folder / "checkpoint", artifact, quant, BUCKETS, dtype)
        runtime.load(artifact, threads=args.threads)  # packs weights, which is done once for a machine
        command = [sys.executable, "-m", "benchmarks.studies.stored_floats", "--measure", artifact, "--threads", args.threads]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        weights = sum(path.stat().st_size for path in (artifact / "weights").iterdir())
        packed = sum(path.stat().st_size for path in (artifact / ".host").rglob("*.bin"))
        results[side] = {"weights_mb": round(weights / 1e6, 1), "host_mb": round(packed / 1e6, 1)}
        results[side] |= json.loads(done.stdout.splitlines()[-1])
        sides[side] = Side(artifact, args.threads)
        print(side, results[side], file=sys.stderr, flush=True)
    turns = [{name: side.run() for name, side in sides.items()} for _ in range(args.runs + 1)][1:]
    graphs = turns[0][args.sides[0]]
    for side in args.sides:
        for graph in graphs:
            ratio = statistics.median(turn[side][graph] / turn[args.sides[0]][graph] for turn in turns)
            results[side][graph] = round(ratio, 3)
    return results


if __name__ == "__main__":
    main()
