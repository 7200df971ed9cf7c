"""The text decoder's part of a config, in the spelling of transformers' LlamaConfig and MllamaTextConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keys import Keys
from .types import ConfigError, Llama3Scaling, RopeConfig, TextConfig

# transformers' LlamaConfig; rms_norm_eps is given by every published file.
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}


def llama(keys: Keys, defaults: Mapping[str, Any] = LLAMA_DEFAULTS, **extra: Any) -> TextConfig:
    """The decoder's sizes; `defaults` are those of the model's own code, `extra` are fields that no key gives."""
    hidden = keys.size("hidden_size", defaults["hidden_size"])
    heads = keys.size("num_attention_heads", defaults["num_attention_heads"])
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    keys.only("tie_word_embeddings", False)
    vocab = keys.size("vocab_size", defaults["vocab_size"])
    sizes = {
        "hidden_size": hidden,
        "layers": keys.size("num_hidden_layers", defaults["num_hidden_layers"]),
        "heads": heads,
        "kv_heads": keys.size("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        "head_dim": keys.size("head_dim", hidden // heads),
        "intermediate_size": keys.size("intermediate_size", defaults["intermediate_size"]),
        "vocab_size": vocab,
        "embed_rows": vocab,
        "rms_norm_eps": keys.number("rms_norm_eps", defaults["rms_norm_eps"]),
        "rope": _rope(keys, defaults["rope_theta"]),
        "max_positions": keys.size("max_position_embeddings", defaults["max_position_embeddings"]),
    }
    return TextConfig(**{**sizes, **extra})


def _rope(keys: Keys, theta: float) -> RopeConfig:
    """From the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    found = [_scaling(section) for section in (new, old) if section.data]
    base = keys.number("rope_theta", new.number("rope_theta", theta))
    return RopeConfig(theta=base, llama3=next((scaling for scaling in found if scaling), None))


def _scaling(section: Keys) -> Llama3Scaling | None:
    kind = section.get("rope_type", "default", also=["type"])
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{section.where}: rope_type is {kind!r}; supported: 'default', 'llama3'")
    return Llama3Scaling(
        factor=section.number("factor", 8.0),
        low_freq_factor=section.number("low_freq_factor", 1.0),
        high_freq_factor=section.number("high_freq_factor", 4.0),
        original_positions=section.size("original_max_position_embeddings", 8192),
    )
