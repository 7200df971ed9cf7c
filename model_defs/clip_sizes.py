"""Sizes of vision towers that checkpoints name without storing their config."""

from typing import Any

# From the published config of openai/clip-vit-large-patch14-336.
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
}
