"""Llama-3.2-Vision 11B and 90B. Defaults are those of transformers' MllamaTextConfig and MllamaVisionConfig."""

from __future__ import annotations

from pathlib import Path

from .keys import MOST_LAYERS, MOST_PIXELS, MOST_TILES, Keys, bos_eos
from .llama import llama
from .types import ConfigError, ModelConfig, TiledConfig

TEXT_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
EXTRA_ROWS = 8  # the embedding table is this much longer than the vocabulary; the first of these rows is the image's


def read_mllama(keys: Keys, checkpoint: Path, vision_tower: Path | None) -> ModelConfig:
    text_keys, vision_keys = keys.section("text_config"), keys.section("vision_config")
    text_keys.only("model_type", "mllama_text_model")
    vision_keys.only("model_type", "mllama_vision_model")
    bos, eos = bos_eos(keys, text_keys, default=(128000, 128001))
    keys.only("tie_word_embeddings", False)
    cross = text_keys.numbers("cross_attention_layers", CROSS_LAYERS)
    vocab = text_keys.size("vocab_size", TEXT_DEFAULTS["vocab_size"])
    text = llama(text_keys, TEXT_DEFAULTS, cross_layers=tuple(sorted(cross)), embed_rows=vocab + EXTRA_ROWS)
    vision = _tiled(vision_keys)
    image_token_id = keys.size("image_token_id", vocab, also=["image_token_index"])
    keys.overruled_by(text_keys)
    return ModelConfig(
        family="mllama",
        layout="hf",
        text=text,
        vision=vision,
        image_token_id=image_token_id,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_mode="tiles",
        grids=vision.ratios,
    )


def _tiled(keys: Keys) -> TiledConfig:
    keys.only("hidden_act", "gelu")
    keys.only("num_channels", 3)
    for unused in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        keys.get(unused)
    config = TiledConfig(
        hidden_size=keys.size("hidden_size", 1280),
        layers=keys.size("num_hidden_layers", 32, most=MOST_LAYERS),
        global_layers=keys.size("num_global_layers", 8, most=MOST_LAYERS),
        heads=keys.size("num_attention_heads", 16, also=["attention_heads"]),
        intermediate_size=keys.size("intermediate_size", 5120),
        image_size=keys.size("image_size", 448, most=MOST_PIXELS),
        patch_size=keys.size("patch_size", 14),
        norm_eps=keys.number("norm_eps", 1e-5),
        tiles=keys.size("max_num_tiles", 4, most=MOST_TILES),
        ratios=_ratios(keys),
        taps=keys.numbers("intermediate_layers_indices", [3, 7, 15, 23, 30]),
    )
    # Known by the sizes above; a file that says otherwise is not understood.
    keys.only("max_aspect_ratio_id", len(config.ratios))
    if (width := keys.size("vision_output_dim", config.feature_size)) != config.feature_size:
        raise ConfigError(
            f"{keys.where}: vision_output_dim is {width}, but hidden_size {config.hidden_size} and "
            f"{len(config.taps)} intermediate_layers_indices make {config.feature_size}"
        )
    return config


def _ratios(keys: Keys) -> tuple[tuple[int, int], ...]:
    ratios = keys.get("supported_aspect_ratios", RATIOS)
    for pair in ratios if isinstance(ratios, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ConfigError(
                f"{keys.where}: supported_aspect_ratios is {ratios!r:.200}; expected a list of pairs, rows and columns of tiles"
            )
    return tuple((rows, columns) for rows, columns in ratios)
