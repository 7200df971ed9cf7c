"""The text decoder's part of a config, in the spelling of transformers' LlamaConfig and MllamaTextConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keys import MOST_LAYERS, Keys
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
    keys.only("use_sliding_window", False)
    layers = keys.size("num_hidden_layers", defaults["num_hidden_layers"], most=MOST_LAYERS)
    keys.only("layer_types", ["full_attention"] * layers)
    vocab = keys.size("vocab_size", defaults["vocab_size"])
    positions = keys.size("max_position_embeddings", defaults["max_position_embeddings"])
    sizes = {
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": keys.size("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        "head_dim": keys.size("head_dim", hidden // heads),
        "intermediate_size": keys.size("intermediate_size", defaults["intermediate_size"]),
        "vocab_size": vocab,
        "embed_rows": vocab,
        "rms_norm_eps": keys.number("rms_norm_eps", defaults["rms_norm_eps"]),
        "rope": _rope(keys, defaults["rope_theta"], positions),
        "max_positions": positions,
    }
    return TextConfig(**{**sizes, **extra})


def _rope(keys: Keys, theta: float, positions: int) -> RopeConfig:
    """The rotary embedding, from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters).

    Where both are given, transformers 5 takes a rope_scaling that is not empty for the whole of rope_parameters, and a
    rope_theta inside takes precedence. Older versions have no rope_parameters.
    """
    section = _rope_section(keys)
    inside, outside = section.get("rope_theta"), keys.get("rope_theta")
    if inside is not None and outside not in (None, inside):
        keys.notes.append(
            f"{keys.where}: rope_theta is {outside!r:.100}, but {inside!r:.100} in {section.name}, which counts, as in "
            "transformers 5"
        )
    section.only("partial_rotary_factor", 1.0)
    counting = keys if inside is None else section
    return RopeConfig(theta=counting.number("rope_theta", theta), llama3=_scaling(section, positions))


def _rope_section(keys: Keys) -> Keys:
    """The section that counts; a different other one is noted."""
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    if not old.data:
        return new
    if new.data and new.data != old.data:
        keys.notes.append(
            f"{keys.where}: rope_scaling is {dict(old.data)!r:.100} but rope_parameters is {dict(new.data)!r:.100}; the first "
            "counts, as in transformers 5"
        )
    new.seen.update(new.data)
    return old


def _scaling(section: Keys, positions: int) -> Llama3Scaling | None:
    """The scaling, if any. `positions` of the model: those it was trained on where the section does not say (transformers)."""
    kind = section.get("rope_type", "default", also=["type"])
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{section.where}: rope_type is {kind!r:.200}; supported: 'default', 'llama3'")
    return Llama3Scaling(
        factor=section.number("factor", None),
        low_freq_factor=section.number("low_freq_factor", None),
        high_freq_factor=section.number("high_freq_factor", None),
        original_positions=section.size("original_max_position_embeddings", positions),
    )
