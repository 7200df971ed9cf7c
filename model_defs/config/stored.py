"""A model's sizes as JSON and back: artifacts keep them, so that tools can trace the definition again."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .stage import WHOLE
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

VISIONS = {"llava": ClipConfig, "llava_next": ClipConfig, "mllama": TiledConfig, "qwen_vl": ResampledConfig}


def encode_config(config: ModelConfig) -> bytes:
    """The whole model's config, also for one of its stages."""
    data = asdict(config)
    del data["text"]["stage"]
    if not data["text"]["int8_cache"]:  # so that models without one keep their stored form
        del data["text"]["int8_cache"]
    return json.dumps(data, indent=1).encode() + b"\n"


def decode_config(data: bytes, where: str) -> ModelConfig:
    """The config that `encode_config` wrote; raises ConfigError, naming `where`, for anything else."""
    try:
        fields = _frozen(json.loads(data))
        text, vision = fields.pop("text"), fields.pop("vision")
        rope = text.pop("rope")
        scaling = rope.pop("llama3")
        decoder = TextConfig(**text, rope=RopeConfig(**rope, llama3=Llama3Scaling(**scaling) if scaling else None), stage=WHOLE)
        return ModelConfig(**fields, text=decoder, vision=VISIONS[fields["family"]](**vision))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where} is damaged ({error}); compile the checkpoint again or fetch the artifact again") from error


def _frozen(value: Any) -> Any:
    """Lists, which JSON has for tuples, as tuples."""
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(each) for key, each in value.items()} if isinstance(value, dict) else value
