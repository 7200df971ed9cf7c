"""Tiny LLaVA-1.6 and Llama-3.2-Vision models of transformers with random weights, and their checkpoints without tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.utils import logging as transformers_logging

GOLDEN_QWEN = Path(__file__).parent / "golden" / "qwen_vl_tiny" / "checkpoint"


def llava_next_model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112,
        max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=28, patch_size=7,
    )  # fmt: skip
    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_index=90, image_grid_pinpoints=grids, tie_word_embeddings=False
    )
    return randomised(LlavaNextForConditionalGeneration(config), seed)


def mllama_model(seed: int = 0) -> MllamaForConditionalGeneration:
    text = MllamaTextConfig(
        vocab_size=88, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=112,
        cross_attention_layers=[1, 3], max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_global_layers=2, attention_heads=2, intermediate_size=48, image_size=28,
        patch_size=14, intermediate_layers_indices=[0, 2], vision_output_dim=96,
    )  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=88)
    return randomised(MllamaForConditionalGeneration(config), seed)


def randomised(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        norm = "norm" in name and name.endswith(".weight")
        value.copy_(1 + 0.2 * noise if norm else (0.7 if "gate" in name and value.numel() == 1 else 0.15) * noise)
    return model.float().eval()


def save(model: Any, folder: Path) -> Path:
    """config.json and weights as save_pretrained writes them, in the spelling of the hub."""
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bar:
            transformers_logging.enable_progress_bar()
    return folder


def write_original_config(folder: Path, model: LlavaNextForConditionalGeneration) -> Path:
    """config.json in the form of the original repository, and the tower's as another folder."""
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size rms_norm_eps "
        "max_position_embeddings"
    ).split()
    settings = {name: getattr(text, name) for name in names} | {
        "model_type": "llava",
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "tiny/clip",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tower = folder / "clip"
    tower.mkdir()
    names = "hidden_size num_hidden_layers num_attention_heads intermediate_size image_size patch_size".split()
    (tower / "config.json").write_text(json.dumps({"vision_config": {name: getattr(vision, name) for name in names}}))
    return tower
