"""Time of one image through CLIP-L/336, by how its layers are stored, and in transformers.

    python -m benchmarks.studies.vision_encode [--runs 9] [--threads 2]

Random weights before a small decoder. The sides take turns. Medians in seconds, and their ratios to transformers in bfloat16
(the layers that LLaVA uses, no projector, in transformers' favour), are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.backends.base import new_feed
from staticvl.tools.development.random_checkpoint import write_checkpoint
from staticvl.tools.progress import TerminalProgress

SMALL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip


def compiled(checkpoint: Path, quant: str, out: Path, threads: int) -> Callable[[], object]:
    """Runs the vision graph of one quantisation."""
    buckets = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=64, slots=1)
    build(Options(checkpoint=checkpoint, out=out, buckets=buckets, quant=quant), TerminalProgress())
    model = runtime.load(out, threads=threads)
    graph = next(graph for graph in model.artifact.manifest.graphs if graph.kind == "vision")
    feed = new_feed(graph)
    return lambda: model.engine.backend.run(graph, feed)


def reference() -> Callable[[], object]:
    """The layers of the tower that LLaVA uses, by transformers in bfloat16."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, image_size=336, patch_size=14
    )
    model = CLIPVisionModel(config).to(torch.bfloat16).eval()
    pixels = torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16)

    @torch.inference_mode()
    def run() -> object:
        return model(pixels)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="turns of each side; default: 9")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU; default: 2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = {f"text_config.{name}": value for name, value in SMALL.items()}
        write_checkpoint(Path("llava-1.5-7b-hf"), folder / "checkpoint", overrides=overrides)
        sides = {
            quant: compiled(folder / "checkpoint", quant, folder / quant, args.threads) for quant in ("none", "w8a8+vision")
        }
        sides["transformers bfloat16"] = reference()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.runs + 1):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(each[1:]) for side, each in seconds.items()}
    base = medians["transformers bfloat16"]
    print(json.dumps({side: {"seconds": round(each, 4), "speed": round(base / each, 2)} for side, each in medians.items()}))


if __name__ == "__main__":
    main()
