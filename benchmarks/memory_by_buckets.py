"""Memory and disk of an artifact with many buckets against one with one bucket of each kind.

    python -m benchmarks.memory_by_buckets [--hidden 1024] [--layers 8] [--tp 2]

Both artifacts come from the same random checkpoint. A separate process loads each, opens every graph and runs it. Measured are
USS (pages that belong to this process alone and are mapped once) and PSS (shared pages counted once). The per-machine cache of
packed weights does not count as disk of the artifact.

With `--tp N` the artifacts hold only the first of N ranks and are not certified. Its graphs run without the other ranks: the
results are meaningless, the memory is not. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import read_manifest
from staticvl.runtime.backends.base import new_feed
from staticvl.runtime.backends.open import open_backend

if TYPE_CHECKING:
    pass

CHECKPOINT = Path(__file__).parent.parent / "tools" / "assets" / "tiny_llava15"
FEW = Buckets(prefill=(128,), decode=(4,), vision=(1,), context=2048, slots=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the language model; default: 1024")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder; default: 8")
    parser.add_argument("--prefill", type=int, default=8, help="prefill buckets of the larger artifact, of up to 128 tokens")
    parser.add_argument("--quant", default="none", help="format of the weights; default: none")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share the model; default: 1")
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
    from staticvl.tools.development.random_checkpoint import write_checkpoint
    from staticvl.tools.progress import TerminalProgress

    write_config(folder / "config", args.hidden, args.layers)
    write_checkpoint(folder / "config", folder / "checkpoint")
    result = {}
    sizes = tuple(128 * i // args.prefill for i in range(1, args.prefill + 1))
    for name, buckets in (("few", FEW), ("many", replace(FEW, prefill=sizes, decode=(1, 2, 3, 4)))):
        out = folder / name
        options = Options(checkpoint=folder / "checkpoint", out=out, buckets=buckets, quant=args.quant, tp=args.tp)
        build(options, TerminalProgress())
        for _ in range(2):  # the first time packs the weights
            done = subprocess.run([sys.executable, __file__, "--measure", out], capture_output=True, text=True, check=True)
        result[name] = json.loads(done.stdout.splitlines()[-1])
    ratios = {f"{key}_ratio": round(result["many"][key] / result["few"][key], 3) for key in result["few"]}
    settings = {name: getattr(args, name) for name in ("hidden", "layers", "prefill", "quant", "tp")}
    return {**result, **ratios, **settings}


def write_config(folder: Path, hidden: int, layers: int) -> None:
    """Write the embedded model's config with another size."""
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


@dataclass(frozen=True)
class Silent:
    """A group whose other members bring nothing; see runtime.backends.base.Group."""

    size: int
    rank: int = 0
    stage: int = 0
    stages: int = 1

    def send(self, array: np.ndarray, stage: int) -> None:
        raise NotImplementedError("a pipeline does not run without the others")

    receive = send

    def all_reduce(self, array: np.ndarray) -> None:
        pass

    def all_gather(self, array: np.ndarray, out: np.ndarray) -> None:
        pass


def measure(artifact: Path) -> dict[str, float]:
    """Open and run every graph; megabytes of memory and disk."""
    manifest = read_manifest(artifact)
    if manifest.tp == 1:
        backend = runtime.load(artifact).engine.backend
    else:
        group = Silent(manifest.tp)
        backend = open_backend(manifest.backend, artifact, manifest.cache, manifest=manifest, group=group)
    for graph in manifest.graphs:
        backend.run(graph, new_feed(graph))
    memory = psutil.Process().memory_full_info()
    disk = sum(spec.nbytes for spec in manifest.files.values()) + (artifact / "manifest.json").stat().st_size
    return {"uss_mb": memory.uss / 1e6, "pss_mb": memory.pss / 1e6, "disk_mb": disk / 1e6}


if __name__ == "__main__":
    main()
