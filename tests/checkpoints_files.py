"""Writing a checkpoint's files, and the random weights in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def randomise(model: Any, seed: int) -> Any:
    """Every weight at random, in float32: norms around 1, the rest around 0. Tanh gates are far from 0, where they would hide
    what is after them.
    """
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.rpartition(".")[2].startswith(("gate", "cross_attn_attn_gate", "cross_attn_mlp_gate")) and value.numel() == 1:
            value.copy_(noise.sign() * (0.4 + 0.4 * noise.abs()))
        elif "norm" in name and name.endswith(".weight"):
            value.copy_(1 + 0.2 * noise)
        else:
            value.copy_((0.3 if name.endswith("embed_tokens.weight") else 0.15) * noise)
    return model


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, fmt: str, sharded: bool) -> None:
    """model.safetensors or pytorch_model.bin, in one file or in shards with an index."""
    stem, suffix = ("model", "safetensors") if fmt == "safetensors" else ("pytorch_model", "bin")
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    parts = _split(tensors) if sharded else [tensors]
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{suffix}" if sharded else f"{stem}.{suffix}"
        weight_map |= dict.fromkeys(part, name)
        if fmt == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    if sharded:
        total = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _shard_limit(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values()) // 2


def _split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Three parts, cut without regard to layers, as published shards are."""
    names = sorted(tensors)
    step = -(-len(names) // 3)
    return [{name: tensors[name] for name in names[i : i + step]} for i in range(0, len(names), step)]


def save_pretrained(folder: Path, model: Any, sharded: bool, dtype: torch.dtype) -> None:
    """Weights as transformers writes them; they are rounded to `dtype`."""
    from transformers.utils import logging as transformers_logging

    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.to(dtype).save_pretrained(folder, max_shard_size=_shard_limit(model.state_dict()) if sharded else "5GB")
    finally:
        model.float()
        if bar:
            transformers_logging.enable_progress_bar()


def llama_sizes(text: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    return {key: getattr(text, key) for key in keys}


def clip_config(vision: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size",
        "projection_dim",
    )  # fmt: skip
    return {"model_type": "clip_vision_model", **{key: getattr(vision, key) for key in keys}}
