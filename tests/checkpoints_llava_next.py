"""Tiny LLaVA-1.6 checkpoints with random weights, in the layouts of llava-hf and of the original repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from .checkpoints import (
    CHAT_TEMPLATE,
    MEAN,
    STD,
    clip_vision_config,
    hub_name,
    known_dims,
    llama_config,
    original_name,
    write_clip,
    write_original_tokenizer,
)
from .checkpoints_files import clip_config, llama_sizes, randomise, save_pretrained, write_json, write_weights
from .checkpoints_tokenizers import hf_tokenizer, image_token_id, write_hf_tokenizer

# The published list in tiles. hf: (rows, columns); the original code reads the same pairs as (columns, rows).
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass(frozen=True, slots=True)
class TinyNext:
    """A checkpoint on disk and the same weights as a transformers model, which reads grids as (rows, columns)."""

    folder: Path
    model: LlavaNextForConditionalGeneration  # float32, eval mode
    image_token_id: int  # hf: `<image>`. original: <unk>, which no text yields, stands for an image in `model`
    vision_tower: Path | None  # original: a folder that gives the tower's sizes; its weights are of another tower


def tiny_llava_next(
    folder: Path,
    *,
    seed: int = 0,
    layout: Literal["hf", "original"] = "hf",
    fmt: Literal["safetensors", "bin"] = "safetensors",
    sharded: bool = False,
    names: Literal["new", "old", "saved"] = "old",
    dtype: torch.dtype = torch.float32,
    grids: tuple[tuple[int, int], ...] = GRIDS,
    **dims: int,
) -> TinyNext:
    """Write a tiny LLaVA-1.6 into `folder` and return it with its transformers model.

    Arguments as of tiny_llava; `grids` is image_grid_pinpoints in tiles, as the layout spells it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    original = layout == "original"
    token = 0 if original else image_token_id()
    d = known_dims({"context": 1024, **dims})
    model = _model(d, seed, token, tuple((b, a) for a, b in grids) if original else grids)
    for value in model.state_dict().values():
        value.copy_(value.to(dtype))
    if original:
        _write_original(folder, model, fmt=fmt, sharded=sharded, dtype=dtype)
        _write_other_tower(folder / "clip", d, seed + 1)
        return TinyNext(folder, model, token, folder / "clip")
    _write_hf(folder, model, fmt=fmt, sharded=sharded, names=names, dtype=dtype)
    return TinyNext(folder, model, token, None)


def _model(
    d: dict[str, int], seed: int, image_token_id: int, grids: tuple[tuple[int, int], ...]
) -> LlavaNextForConditionalGeneration:
    config = LlavaNextConfig(
        text_config=llama_config(d), vision_config=clip_vision_config(d), image_token_index=image_token_id,
        image_grid_pinpoints=_pinpoints(grids, d["image_size"]), image_seq_length=(d["image_size"] // d["patch_size"]) ** 2,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(LlavaNextForConditionalGeneration(config), seed)


def _pinpoints(grids: tuple[tuple[int, int], ...], side: int) -> list[list[int]]:
    return [[first * side, second * side] for first, second in grids]


def _write_hf(
    folder: Path, model: LlavaNextForConditionalGeneration, *, fmt: str, sharded: bool, names: str, dtype: torch.dtype
) -> None:
    if names == "saved":
        assert fmt == "safetensors", "save_pretrained writes safetensors only"
        save_pretrained(folder, model, sharded, dtype)
    else:
        spell = hub_name if names == "old" else str
        write_weights(folder, {spell(k): v.to(dtype) for k, v in model.state_dict().items()}, fmt=fmt, sharded=sharded)
    tokenizer, config = hf_tokenizer(), cast(Any, model.config)
    text, vision = config.text_config, config.vision_config
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "image_token_index": config.image_token_id,
            "model_type": "llava_next",
            "pad_token_id": tokenizer.token_to_id("<pad>"),
            "projector_hidden_act": "gelu",
            "text_config": {"model_type": "llama", "torch_dtype": "float16", **llama_sizes(text), "head_dim": text.head_dim},
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "use_image_newline_parameter": True,
            "vision_config": clip_config(vision),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": text.vocab_size,
        },
    )
    write_hf_tokenizer(folder, tokenizer, processor="LlavaNextProcessor")
    write_preprocessor(folder, vision.image_size, config.image_grid_pinpoints)
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_preprocessor(folder: Path, side: int, pinpoints: list[list[int]]) -> None:
    write_json(
        folder / "preprocessor_config.json",
        {
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": side, "width": side},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": pinpoints,
            "image_mean": MEAN,
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": side},
        },
    )


def _write_original(
    folder: Path, model: LlavaNextForConditionalGeneration, *, fmt: str, sharded: bool, dtype: torch.dtype
) -> None:
    """The files of an original repository: the vision tower, trained with the rest, is inside."""
    config = cast(Any, model.config)
    text, vision = config.text_config, config.vision_config
    inside = {_original_name(name): value.to(dtype) for name, value in model.state_dict().items()}
    write_weights(folder, inside, fmt=fmt, sharded=sharded)
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            **llama_sizes(text),
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "freeze_mm_mlp_adapter": False,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "image_aspect_ratio": "anyres",
            "image_crop_resolution": 224,
            "image_grid_pinpoints": [pair[::-1] for pair in config.image_grid_pinpoints],
            "image_split_resolution": 224,
            "mm_hidden_size": vision.hidden_size,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "tiny/clip",
            "mm_vision_tower_lr": 2e-06,
            "model_type": "llava",
            "pad_token_id": 0,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": text.max_position_embeddings,
            "tokenizer_padding_side": "right",
            "torch_dtype": "bfloat16",
            "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": True,
            "use_cache": True,
            "use_mm_proj": True,
        },
    )
    write_original_tokenizer(folder, text.max_position_embeddings)


def _original_name(name: str) -> str:
    if name == "model.image_newline":
        return name
    inside = "model.vision_tower.vision_tower." if name.startswith("model.vision_tower.") else ""
    return inside + original_name(name)


def _write_other_tower(folder: Path, d: dict[str, int], seed: int) -> None:
    """The tower that the model was trained from: of the same sizes, but with other weights, which nothing may use."""
    folder.mkdir()
    other = _model(d, seed, 0, GRIDS).state_dict()
    tensors = {original_name(name): value for name, value in other.items() if name.startswith("model.vision_tower.")}
    write_clip(folder, tensors, clip_vision_config(d), "safetensors")
