"""Clauses that say what a setting that differs is, in the words of the files that people edit."""

from __future__ import annotations

from typing import Any

FILTERS = ("nearest", "Lanczos", "bilinear", "bicubic", "box", "Hamming")  # Pillow's numbers of them
WORDS = {
    "text.rms_norm_eps": "the epsilon of the decoder's norms: rms_norm_eps, or layer_norm_epsilon of Qwen-VL, in config.json",
    "vision.layer_norm_eps": "the epsilon of the vision tower's norms: layer_norm_eps in config.json",
    "vision.norm_eps": "the epsilon of the vision tower's norms: norm_eps in config.json",
    "vision.activation": "hidden_act of the vision tower in config.json",
    "text.heads": "the same weights are read as another number of heads: num_attention_heads in config.json",
    "text.kv_heads": "num_key_value_heads in config.json",
    "vision.heads": "the same weights are read as another number of heads: heads of the vision tower in config.json",
    "vision.used_layers": "another vision feature layer: vision_feature_layer in config.json",
    "vision.taps": "other vision feature layers: intermediate_layers_indices in config.json",
    "vision.keep_class_token": "vision_feature_select_strategy in config.json",
    "text.newline": "one side has an image newline, the other has not",
    "rope.theta": "the rotary base: rope_theta in config.json",
}


def words_of(name: str, reference: Any, candidate: Any) -> str:
    """A clause about a setting, starting with ": "; "" for one whose name says all."""
    if name == "image.resample" and all(isinstance(each, int) for each in (reference, candidate)):
        return f": the resize filter is {FILTERS[candidate]}, where {FILTERS[reference]} is right"
    if name in ("image.mean", "image.std") and candidate == reference[::-1]:
        return ": the channel order is reversed (BGR in place of RGB)"
    return f": {WORDS[name]}" if name in WORDS else ""
