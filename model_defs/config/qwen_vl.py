"""Qwen-VL and Qwen-VL-Chat (9.6B). Defaults are those of the published configuration_qwen.py and visual.py."""

from __future__ import annotations

from pathlib import Path

from .keys import MOST_LAYERS, MOST_PIXELS, Keys
from .types import ConfigError, ModelConfig, ResampledConfig, RopeConfig, TextConfig

STORED_POSITIONS = 256  # a 16 x 16 table, whatever the image's size
VISION_EPS = 1e-6  # of every norm in the tower, fixed in its code
QUERIES = 256
RESAMPLER_HEAD_DIM = 128
PAD_AFTER_START = 2  # <img>, </img> and <imgpad> have consecutive ids
ENDOFTEXT_BEFORE_START = 214
# Training, dtypes, and switches between kernels that compute the same.
INERT = "attn_dropout_prob bf16 emb_dropout_prob fp16 fp32 onnx_safe softmax_in_fp32 tokenizer_type use_flash_attn".split()


def read_qwen_vl(keys: Keys, checkpoint: Path, vision_tower: Path | None) -> ModelConfig:
    if keys.get("visual") is None:
        raise ConfigError(
            f"{keys.where}: it has no section visual, so this is a text-only Qwen; expected Qwen-VL or Qwen-VL-Chat"
        )
    for unused in INERT:
        keys.get(unused)
    visual = keys.section("visual")
    vision = _resampled(visual)
    start = visual.size("image_start_id", 151857)
    text = _text(keys)
    if vision.output_size != text.hidden_size:
        raise ConfigError(
            f"{keys.where}: visual output_dim is {vision.output_size} but hidden_size is {text.hidden_size}; expected the "
            "same size"
        )
    return ModelConfig(
        family="qwen_vl",
        layout="hf",
        text=text,
        vision=vision,
        image_token_id=start + PAD_AFTER_START,
        # <|endoftext|> comes first of the special tokens, and 214 ids before <img>; there is no BOS.
        bos_token_id=start - ENDOFTEXT_BEFORE_START,
        eos_token_ids=(start - ENDOFTEXT_BEFORE_START,),
        image_mode="stretch",
    )


def _text(keys: Keys) -> TextConfig:
    for name, value in (("no_bias", True), ("rotary_pct", 1.0), ("scale_attn_weights", True), ("tie_word_embeddings", False)):
        keys.only(name, value)
    for name in ("use_cache_quantization", "use_cache_kernel"):
        keys.only(name, False)
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    vocab, trained = keys.size("vocab_size", 151936), keys.size("seq_length", 2048)
    return TextConfig(
        hidden_size=hidden,
        layers=keys.size("num_hidden_layers", 32, most=MOST_LAYERS),
        heads=heads,
        kv_heads=heads,
        head_dim=keys.size("kv_channels", 128),
        intermediate_size=keys.size("intermediate_size", 22016) // 2,  # of w1 and w2 together
        vocab_size=vocab,
        embed_rows=vocab,
        rms_norm_eps=keys.number("layer_norm_epsilon", 1e-6),
        rope=RopeConfig(
            theta=keys.number("rotary_emb_base", 10000.0),
            ntk_positions=trained if keys.get("use_dynamic_ntk", True) else None,
            logn_positions=trained if keys.get("use_logn_attn", True) else None,
        ),
        max_positions=keys.size("max_position_embeddings", 8192),
        qkv_bias=True,
    )


def _resampled(keys: Keys) -> ResampledConfig:
    width = keys.size("width", 1664)
    return ResampledConfig(
        hidden_size=width,
        layers=keys.size("layers", 48, most=MOST_LAYERS),
        heads=keys.size("heads", 16),
        intermediate_size=int(width * keys.number("mlp_ratio", 4.9231)),
        image_size=keys.size("image_size", 448, most=MOST_PIXELS),
        patch_size=keys.size("patch_size", 14),
        output_size=keys.size("output_dim", 4096),
        queries=keys.size("n_queries", QUERIES),
        layer_norm_eps=VISION_EPS,
        stored_positions=STORED_POSITIONS,
        resampler_head_dim=RESAMPLER_HEAD_DIM,
    )
