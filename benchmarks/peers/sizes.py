"""The models of the benchmark, and the lengths at which they are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parent.parent.parent / "tools" / "assets" / "tiny_llava15"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A LLaVA-1.5, and the lengths (in tokens) at which it is timed."""

    source: str  # a folder with a checkpoint, or a model of tools/known_models.py that random weights are made for
    overrides: Mapping[str, Any] = field(default_factory=dict)  # values of that model's config.json
    prefill_buckets: tuple[int, ...]
    context: int  # room of every cache
    prompt: int  # of the prefill that is timed
    short: int  # in the cache when decoding is timed, ...
    long: int  # ... and again
    text: int  # of the prompt after the image
    batch: int = 8
    steps: int = 16  # decode steps timed at once


# 1.1 billion parameters in the decoder, the sizes of TinyLlama; CLIP-L/336 sees the images.
FULL = Size(
    source="llava-1.5-7b-hf",
    overrides={
        "text_config.hidden_size": 2048,
        "text_config.num_hidden_layers": 22,
        "text_config.intermediate_size": 5632,
        "text_config.num_attention_heads": 32,
        "text_config.num_key_value_heads": 4,
    },
    # Chunks of 256 stay in a core's cache: 512 tokens at once take 5 % longer. The last of a prompt go into smaller ones.
    prefill_buckets=(64, 128, 256),
    context=1024,
    prompt=512,
    short=64,
    long=600,
    text=64,
)
QUICK = Size(
    source=str(EMBEDDED), prefill_buckets=(8, 32), context=256, prompt=32, short=8, long=48, text=8, batch=2, steps=4
)  # fmt: skip
