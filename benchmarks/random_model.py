"""A compiled model of random weights, 1B-shaped but for its number of layers, for benchmarks."""

from __future__ import annotations

from pathlib import Path

from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.tools.development.random_checkpoint import write_checkpoint

# Hidden size, heads and MLP of the 1.1B decoders that are about; the tower is cut short, since nothing here looks at images.
SHAPE = {
    "text_config.hidden_size": 2048,
    "text_config.num_attention_heads": 32,
    "text_config.num_key_value_heads": 4,
    "text_config.intermediate_size": 5632,
    "vision_config.num_hidden_layers": 2,
}


def checkpoint_of(layers: int, folder: Path) -> Path:
    """The checkpoint, written into `folder`."""
    overrides = {**SHAPE, "text_config.num_hidden_layers": layers}
    write_checkpoint(Path("llava-1.5-7b-hf"), folder, dtype="float16", overrides=overrides)
    return folder


def compiled(folder: Path, layers: int, buckets: Buckets, quant: str = "none") -> Path:
    """The artifact, made in `folder`."""
    checkpoint, out = checkpoint_of(layers, folder / "checkpoint"), folder / "artifact"
    build(Options(checkpoint=checkpoint, out=out, buckets=buckets, quant=quant))
    return out
