"""Configs of known models, with the sizes of their repositories but without their prompts."""

from __future__ import annotations

import json
from pathlib import Path

_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_TEXT = {
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13b": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
_CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
MODELS = {
    "llava-1.5-7b-hf": ("llava", "7b"),
    "llava-1.5-13b-hf": ("llava", "13b"),
    "llava-v1.6-vicuna-7b-hf": ("llava_next", "7b"),
    "llava-v1.6-vicuna-13b-hf": ("llava_next", "13b"),
}


def write_known_model(name: str, folder: Path) -> None:
    """Write the JSON files of the model `name`, one of MODELS, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in _files(*MODELS[name]).items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(family: str, size: str) -> dict[str, object]:
    text = {
        **_TEXT[size],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_key_value_heads": _TEXT[size]["num_attention_heads"],
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    }
    config: dict[str, object] = {
        "image_token_index": 32000,
        "model_type": family,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": _CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    images: dict[str, object] = {
        "crop_size": {"height": 336, "width": 336},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 336},
    }
    if family == "llava_next":
        config |= {"image_grid_pinpoints": _PINPOINTS, "use_image_newline_parameter": True}
        images |= {
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
            "image_grid_pinpoints": _PINPOINTS,
            "image_processor_type": "LlavaNextImageProcessor",
        }
    return {
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001},
        "preprocessor_config.json": images,
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
        },
        "config.json": config,
    }
