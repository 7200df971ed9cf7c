"""A checkpoint's config.json, read into frozen dataclasses.

Everything about sizes comes from the checkpoint's own files; where a published file leaves a value out, the default is
the one that the model's own code uses (noted beside each). Old and new spellings are accepted. A key that is neither used
nor known to have no effect is an error: an unknown setting may change the numbers.

Only the standard library is used here, so that planning a build needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from .json_files import irregular, parse_object
from .keys import Keys, load_config, read_json
from .llava import read_llava
from .mllama import read_mllama
from .quant import (
    ASYMMETRIC,
    KV_CACHES,
    QUANTS,
    READY_MADE,
    head_quant,
    quant_bits,
    quant_block,
    quant_parts,
    text_quant,
    tower_quant,
)
from .qwen_vl import read_qwen_vl
from .stage import Stage
from .stored import decode_config, encode_config
from .types import (
    ClipConfig,
    ConfigError,
    Llama3Scaling,
    ModelConfig,
    ResampledConfig,
    RopeConfig,
    TextConfig,
    TiledConfig,
)

__all__ = [
    "ASYMMETRIC",
    "KV_CACHES",
    "QUANTISATION_KEYS",
    "QUANTS",
    "READY_MADE",
    "ClipConfig",
    "ConfigError",
    "Llama3Scaling",
    "ModelConfig",
    "ResampledConfig",
    "RopeConfig",
    "Stage",
    "TextConfig",
    "TiledConfig",
    "decode_config",
    "encode_config",
    "head_quant",
    "irregular",
    "parse_object",
    "quant_bits",
    "quant_block",
    "quant_parts",
    "read_config",
    "read_json",
    "text_quant",
    "tower_quant",
]

Reader = Callable[[Keys, Path, Path | None], ModelConfig]  # keys, checkpoint, folder of a vision tower stored apart
QUANTISATION_KEYS = ("quantization_config", "compression_config")
READERS: dict[str, Reader] = {
    "llava": read_llava,
    "llava_llama": read_llava,
    "llava_next": read_llava,
    "mllama": read_mllama,
    "qwen": read_qwen_vl,
}


def read_config(
    checkpoint: Path,
    *,
    vision_tower: Path | None = None,
    ignore_keys: Collection[str] = (),
    notes: list[str] | None = None,
) -> ModelConfig:
    """Read `checkpoint`/config.json; `vision_tower` is the folder of a tower stored apart (original LLaVA layout).

    `notes` gains a sentence for every setting that the file has twice with different values: which one counts.
    Raises ConfigError for a missing, malformed or unsupported config.
    """
    data = load_config(checkpoint)
    keys = Keys(data, str(checkpoint / "config.json"), ignore_keys, notes)
    model_type = keys.get("model_type")
    keys.get(QUANTISATION_KEYS[0], also=QUANTISATION_KEYS[1:])  # weights/packing/ reads what it says
    if not isinstance(model_type, str) or model_type not in READERS:
        raise ConfigError(f"{keys.where}: model_type {model_type!r:.200} is not supported; supported: {', '.join(READERS)}")
    config = READERS[model_type](keys, checkpoint, vision_tower)
    keys.finish()
    return config
