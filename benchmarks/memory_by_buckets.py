"""Memory and disk of an artifact with many buckets against one with one of each kind; the last line is one JSON object.

    python benchmarks/memory_by_buckets.py [--hidden 1024] [--layers 8]

Both artifacts come from the same random checkpoint. Each is loaded in a process of its own, where every graph is opened
and run; measured are USS (pages that belong to this process alone and are mapped once) and PSS (shared pages counted
once). Files of the per-machine cache of packed weights are not counted as disk of the artifact.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.feeds import new_feed

CHECKPOINT = Path(__file__).parent.parent / "tools" / "assets" / "tiny_llava15"
FEW = Buckets(prefill=(128,), decode=(4,), vision=(1,), context=2048, slots=4)
MANY = Buckets(prefill=(16, 32, 48, 64, 80, 96, 112, 128), decode=(1, 2, 3, 4), vision=(1,), context=2048, slots=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the language model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--quant", default="none")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="staticvl-memory-") as folder:
        print(json.dumps(compare(Path(folder), args)))


def compare(folder: Path, args: argparse.Namespace) -> dict:
    # Imported here: the processes that are measured load no torch.
    from staticvl.compiler.build import build
    from staticvl.compiler.plan import Options
    from staticvl.tools.progress import TerminalProgress
    from staticvl.tools.random_checkpoint import write_checkpoint

    write_config(folder / "config", args.hidden, args.layers)
    write_checkpoint(folder / "config", folder / "checkpoint")
    result = {}
    for name, buckets in (("few", FEW), ("many", MANY)):
        out = folder / name
        build(Options(checkpoint=folder / "checkpoint", out=out, buckets=buckets, quant=args.quant), TerminalProgress())
        for _ in range(2):  # the first time packs the weights
            done = subprocess.run([sys.executable, __file__, "--measure", out], capture_output=True, text=True, check=True)
        result[name] = json.loads(done.stdout.splitlines()[-1])
    ratios = {f"{key}_ratio": round(result["many"][key] / result["few"][key], 3) for key in result["few"]}
    return {**result, **ratios, "hidden": args.hidden, "layers": args.layers, "quant": args.quant}


def write_config(folder: Path, hidden: int, layers: int) -> None:
    """The embedded model's settings with another size."""
    folder.mkdir()
    for path in CHECKPOINT.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    heads = hidden // 64
    config["text_config"] |= {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "vocab_size": 32000,
    }
    (folder / "config.json").write_text(json.dumps(config))


def measure(artifact: Path) -> dict[str, float]:
    """Open and run every graph; megabytes of memory and disk."""
    engine = runtime.load(artifact).engine
    for graph in engine.manifest.graphs:
        engine.backend.run(graph, new_feed(graph))
    memory = psutil.Process().memory_full_info()
    disk = sum(spec.nbytes for spec in engine.manifest.files.values()) + (artifact / "manifest.json").stat().st_size
    return {"uss_mb": memory.uss / 1e6, "pss_mb": memory.pss / 1e6, "disk_mb": disk / 1e6}


if __name__ == "__main__":
    main()
