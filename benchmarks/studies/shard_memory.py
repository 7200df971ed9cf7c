"""Memory that converting one rank's weights takes.

    python -m benchmarks.studies.shard_memory [--layers 4] [--vocab 128256] [--tp 1 8] [--quant none]

The checkpoint has the widths of Llama-3.2-Vision 90B, few layers, and zeros for weights: memory does not depend on their
values. Each conversion runs in its own process. Measured are the peak memory beyond the loaded process, the bytes of the
largest tensor in the checkpoint and in the rank, and the bytes of all files of all ranks against those of the whole model. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil

from staticvl.model_defs.config import ModelConfig, TiledConfig, read_config
from staticvl.weights.storage import stored_targets, uniform
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.weight_map import source_names

SETTINGS = Path(__file__).parents[2] / "tools" / "assets" / "tiny_mllama"
DTYPE = "bfloat16"
INTERVAL = 0.002  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder; the last attends to images; default: 4")
    parser.add_argument("--vocab", type=int, default=128256, help="entries of the vocabulary; default: 128256")
    parser.add_argument(
        "--tp", type=int, nargs="+", default=[1, 8], help="numbers of ranks; the last rank of each is converted; default: 1 8"
    )
    parser.add_argument("--quant", default="none", help="format of the weights; default: none")
    parser.add_argument(
        "--folder", type=Path, help="folder for the temporary checkpoint and files; default: a temporary folder"
    )
    parser.add_argument("--measure", nargs=2, metavar=("CHECKPOINT", "OUT"), type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = large_config(args.layers, args.vocab)
    if args.measure:
        print(json.dumps(measure(config, *args.measure, args.tp[0], args.quant)))
        return
    with tempfile.TemporaryDirectory(prefix="staticvl-shard-", dir=args.folder) as folder:
        print(json.dumps(compare(config, Path(folder), args)))


def large_config(layers: int, vocab: int) -> ModelConfig:
    """The published widths; few layers of the tower as well."""
    config = read_config(SETTINGS)
    assert isinstance(config.vision, TiledConfig)
    text = replace(
        config.text, hidden_size=8192, layers=layers, heads=64, kv_heads=8, head_dim=128, intermediate_size=28672,
        vocab_size=vocab, embed_rows=vocab + 8, cross_layers=(layers - 1,),
    )  # fmt: skip
    vision = replace(
        config.vision, hidden_size=1280, layers=2, global_layers=1, heads=16, intermediate_size=5120, image_size=560,
        patch_size=14, taps=(0, 0, 0, 1, 1),
    )  # fmt: skip
    return replace(config, text=text, vision=vision)


def compare(config: ModelConfig, folder: Path, args: argparse.Namespace) -> dict:
    write_zeros(config, folder)
    whole = sum(stored.nbytes for stored in stored_targets(config, args.quant, uniform(DTYPE)).values())
    result: dict = {"layers": args.layers, "vocab": args.vocab, "quant": args.quant, "whole_mb": whole / 1e6}
    for tp in args.tp:
        command = [sys.executable, __file__, "--measure", folder, folder / "out", "--tp", tp, "--quant", args.quant]
        command += ["--layers", args.layers, "--vocab", args.vocab]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        result[f"tp{tp}"] = json.loads(done.stdout.splitlines()[-1]) | {"all_ranks_ratio": ratio(config, args.quant, tp)}
    return result


def ratio(config: ModelConfig, quant: str, tp: int) -> float:
    of_rank, whole = (sum(s.nbytes for s in stored_targets(config, quant, uniform(DTYPE), n).values()) for n in (tp, 1))
    return round(tp * of_rank / whole, 4)


def write_zeros(config: ModelConfig, folder: Path) -> None:
    # Imported here: the processes that are measured load what they need.
    import torch

    from staticvl.weights.writer import lay_out, write_weight_file

    shapes = source_names(config)
    shard = lay_out("model.safetensors", {name: StoredTensor(DTYPE, shape) for name, shape in shapes.items()})
    write_weight_file(folder, shard, lambda name: torch.zeros(shapes[name], dtype=getattr(torch, DTYPE)))


def measure(config: ModelConfig, checkpoint: Path, out: Path, tp: int, quant: str) -> dict[str, float]:
    """Convert the last rank of `tp`."""
    import shutil

    from staticvl.weights.convert import Conversion, convert
    from staticvl.weights.source import open_source

    source, process = open_source(checkpoint), psutil.Process()
    conversion = Conversion(quant=quant, prefix="k", floats=uniform(DTYPE), tp=tp, rank=tp - 1)
    before = peak = process.memory_info().rss
    done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    watch = threading.Thread(target=look)
    watch.start()
    start = time.perf_counter()
    try:
        converted = convert(source, config, out, conversion)
    finally:
        done.set()
        watch.join()
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return {
        "peak_mb": round((peak - before) / 1e6, 1),
        "largest_source_mb": round(max(StoredTensor(DTYPE, shape).nbytes for shape in source_names(config).values()) / 1e6, 1),
        "largest_held_mb": round(max(s.nbytes for s in stored_targets(config, "none", uniform(DTYPE), tp).values()) / 1e6, 1),
        "files_mb": round(sum(spec.nbytes for spec in converted.files.values()) / 1e6, 1),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
