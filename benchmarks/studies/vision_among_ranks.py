"""A vision tower sharded among ranks, or whole on each rank with the tiles divided: which is faster on this machine.

    python -m benchmarks.studies.vision_among_ranks [--tiles 5] [--tp 2] [--runs 7]

CLIP-L/336 with random weights before a small decoder, ONNX Runtime on CPU, one core for each rank. "cut" is what staticvl does:
the ranks' own vision graph over all tiles. "shared out" is the time of the rank with the most tiles for its part, while the
others compute theirs; joining the features is left out, in its favour. Both run alternately; medians are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.backends.base import new_feed
from staticvl.tools.development.random_checkpoint import write_checkpoint
from staticvl.tools.progress import TerminalProgress

# LLaVA-1.5's tower before a decoder that is no work.
SMALL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def main() -> None:
    args = parse()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        share = -(-args.tiles // args.tp)
        overrides = {f"text_config.{name}": value for name, value in SMALL.items()}
        write_checkpoint(Path("llava-1.5-7b-hf"), folder / "checkpoint", overrides=overrides)
        for out, tp, tiles in (("cut", args.tp, args.tiles), ("whole", 1, share)):
            buckets = Buckets(prefill=(16,), decode=(1,), vision=(tiles,), context=64, slots=1)
            build(Options(checkpoint=folder / "checkpoint", out=folder / out, tp=tp, buckets=buckets), TerminalProgress())
        others = [
            subprocess.Popen([sys.executable, __file__, "--serve", folder / "whole"], stdin=-1, stdout=-1)
            for _ in range(args.tp - 1)
        ]
        cut, whole = runtime.load(folder / "cut", threads=1), runtime.load(folder / "whole", threads=1)
        times: dict[str, list[float]] = {"cut": [], "shared out": []}
        for _ in range(args.runs):
            times["cut"].append(timed(cut))
            for other in others:
                tell(other)
            times["shared out"].append(timed(whole))
            for other in others:
                assert other.stdout is not None
                other.stdout.readline()
        for other in others:
            other.kill()
        cut.close()
    result = {name: round(statistics.median(each), 3) for name, each in times.items()}
    print(
        json.dumps(
            {**result, "cut / shared out": round(result["cut"] / result["shared out"], 3), "tiles": args.tiles, "tp": args.tp}
        )
    )


def timed(model: runtime.Model) -> float:
    """Seconds of one run of the vision graph."""
    graph = next(graph for graph in model.artifact.manifest.graphs if graph.kind == "vision")
    start = time.perf_counter()
    model.engine.backend.run(graph, new_feed(graph))
    return time.perf_counter() - start


def tell(other: subprocess.Popen[bytes]) -> None:
    assert other.stdin is not None
    other.stdin.write(b"go\n")
    other.stdin.flush()


def serve(artifact: Path) -> None:
    """Run the vision graph whenever a line comes."""
    model = runtime.load(artifact, threads=1)
    for _ in sys.stdin:
        timed(model)
        print("done", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=5, help="tiles of an image; default: 5")
    parser.add_argument("--tp", type=int, default=2, help="ranks; default: 2")
    parser.add_argument("--runs", type=int, default=7, help="turns of each way; default: 7")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    serve(arguments.serve) if arguments.serve else main()
