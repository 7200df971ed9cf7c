"""Tiny checkpoints with random weights, written file by file as the published ones are, for tests to compile and compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .checkpoints_files import clip_config, llama_sizes, randomise, save_pretrained, write_json, write_weights
from .checkpoints_tokenizers import (
    FLAGS,
    VOCAB,
    hf_tokenizer,
    image_token_id,
    sentencepiece_model,
    write_hf_tokenizer,
)

__all__ = ["CHAT_TEMPLATE", "MEAN", "STD", "Tiny", "tiny_llava", "tiny_model", "write_json", "write_weights"]

# The rule of the published template in other words: ROLE, images, then texts, a space after every text.
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role != 'system' -%}{{ m.role | upper }}{{ ': ' }}{%- endif -%}"
    "{%- for part in m.content if part.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for part in m.content if part.type == 'text' -%}"
    "{%- if m.role == 'assistant' -%}{% generation %}{{ part.text + ' ' }}{% endgeneration %}"
    "{%- else -%}{{ part.text + ' ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True, slots=True)
class Tiny:
    """A checkpoint on disk and the same weights as a transformers model."""

    folder: Path
    model: LlavaForConditionalGeneration  # float32, eval mode
    image_token_id: int  # hf: `<image>`. original: <unk>, which no text yields, stands for an image in `model`
    vision_tower: Path | None  # original: the folder of the CLIP model, when it is stored apart


def tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    layout: Literal["hf", "original"] = "hf",
    fmt: Literal["safetensors", "bin"] = "safetensors",
    sharded: bool = False,
    names: Literal["new", "old", "saved"] = "old",
    dtype: torch.dtype = torch.float32,
    **dims: int,
) -> Tiny:
    """Write a tiny LLaVA-1.5 into `folder` and return it with its transformers model.

    `names` is the spelling of the tensors in the hf layout: old as on the hub, new as transformers has them in memory,
    saved as its save_pretrained writes them. `dtype` is the one of the files; the model is rounded to it. `dims`
    overrides any of hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, context, vision_hidden,
    vision_layers, vision_heads, vision_intermediate, image_size, patch_size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    original = layout == "original"
    model = tiny_model(seed, image_token_id=0 if original else image_token_id(), **dims)
    for value in model.state_dict().values():
        value.copy_(value.to(dtype))
    if original:
        tower = write_original(folder, model, fmt=fmt, sharded=sharded, dtype=dtype)
        return Tiny(folder, model, 0, tower)
    write_hf(folder, model, fmt=fmt, sharded=sharded, names=names, dtype=dtype)
    return Tiny(folder, model, model.config.image_token_id, None)


def tiny_model(seed: int, image_token_id: int, **dims: int) -> LlavaForConditionalGeneration:
    """A random model whose logits differ clearly from token to token: larger weights than a real model's at this width."""
    d = known_dims(dims)
    config = LlavaConfig(
        text_config=llama_config(d), vision_config=clip_vision_config(d), image_token_index=image_token_id,
        image_seq_length=(d["image_size"] // d["patch_size"]) ** 2,
        projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomise(LlavaForConditionalGeneration(config), seed)


def known_dims(dims: dict[str, int]) -> dict[str, int]:
    """The sizes of a tiny LLaVA with some of them replaced."""
    known = {
        "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 112, "vocab": VOCAB,
        "context": 512, "vision_hidden": 32, "vision_layers": 3, "vision_heads": 2, "vision_intermediate": 48,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    assert not dims.keys() - known.keys(), dims.keys() - known.keys()
    return known | dims


def llama_config(d: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=d["vocab"], hidden_size=d["hidden"], num_hidden_layers=d["layers"], num_attention_heads=d["heads"],
        num_key_value_heads=d["kv_heads"], head_dim=d["head_dim"], intermediate_size=d["intermediate"],
        max_position_embeddings=d["context"], rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip


def clip_vision_config(d: dict[str, int]) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=d["vision_hidden"], num_hidden_layers=d["vision_layers"], num_attention_heads=d["vision_heads"],
        intermediate_size=d["vision_intermediate"], image_size=d["image_size"], patch_size=d["patch_size"], projection_dim=24,
    )  # fmt: skip


# --- Hugging Face layout -----------------------------------------------------------------------------------------------


def write_hf(
    folder: Path, model: LlavaForConditionalGeneration, *, fmt: str, sharded: bool, names: str, dtype: torch.dtype
) -> None:
    """The files of a llava-hf repository."""
    if names == "saved":
        save_pretrained(folder, model, sharded, dtype)
        assert fmt == "safetensors", "save_pretrained writes safetensors only"
    else:
        spell = hub_name if names == "old" else str
        write_weights(folder, {spell(k): v.to(dtype) for k, v in model.state_dict().items()}, fmt=fmt, sharded=sharded)
    tokenizer, config = hf_tokenizer(), cast(Any, model.config)
    text, vision = config.text_config, config.vision_config
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": config.image_token_id,
            "model_type": "llava",
            "pad_token_id": tokenizer.token_to_id("<pad>"),
            "projector_hidden_act": "gelu",
            "text_config": {"model_type": "llama", "torch_dtype": "float16", **llama_sizes(text), "head_dim": text.head_dim},
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vision_config": clip_config(vision),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": text.vocab_size,
        },
    )
    write_hf_tokenizer(folder, tokenizer)
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": {"height": vision.image_size, "width": vision.image_size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": STD,
            "processor_class": "LlavaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": vision.image_size},
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def hub_name(name: str) -> str:
    """transformers' name in memory -> the name on the hub."""
    for ours, theirs in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


# --- Original layout ---------------------------------------------------------------------------------------------------


def write_original(folder: Path, model: LlavaForConditionalGeneration, *, fmt: str, sharded: bool, dtype: torch.dtype) -> Path:
    """The files of an original LLaVA repository, and in `folder`/clip the vision tower; returns the tower's folder."""
    tower = folder / "clip"
    tower.mkdir()
    inside: dict[str, Tensor] = {}
    apart: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        vision = name.startswith("model.vision_tower.")
        (apart if vision else inside)[original_name(name)] = value.to(dtype)
    config: Any = model.config
    text, vision = config.text_config, config.vision_config
    for layer in range(text.num_hidden_layers):
        inside[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(
            4, generator=torch.Generator().manual_seed(layer)
        )
    write_weights(folder, inside, fmt=fmt, sharded=sharded)
    if fmt == "bin":
        repeated = {name: value for name, value in inside.items() if "mm_projector" in name}
        torch.save(repeated, folder / "mm_projector.bin")
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            **llama_sizes(text),
            "head_dim": text.head_dim,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "tiny/clip",
            "model_type": "llava",
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_mm_proj": True,
        },
    )
    write_original_tokenizer(folder, text.max_position_embeddings)
    write_clip(tower, apart, vision, fmt)
    return tower


def write_original_tokenizer(folder: Path, positions: int) -> None:
    """What an original repository has beside config and weights."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **{key: {"__type": "AddedToken", "content": token, **FLAGS} for key, token in special.items()},
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": positions // 2,
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write_json(
        folder / "special_tokens_map.json", {k: {"content": t, **FLAGS} for k, t in special.items()} | {"pad_token": "<unk>"}
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": positions}
    write_json(folder / "generation_config.json", ids)


def original_name(name: str) -> str:
    """transformers' name in memory -> the name in the original layout, or in a CLIP model for the vision tower."""
    for ours, theirs in (
        ("lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("model.vision_tower.", "vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def write_clip(folder: Path, tensors: dict[str, Tensor], vision: Any, fmt: str) -> None:
    """A CLIP checkpoint of the old form: a config for both towers, integer sizes for images, an integer buffer."""
    tensors = tensors | {
        "vision_model.embeddings.position_ids": torch.arange((vision.image_size // vision.patch_size) ** 2 + 1)[None],
        "text_model.embeddings.token_embedding.weight": torch.ones(5, 4),
        "text_model.embeddings.position_ids": torch.arange(7)[None],
        "text_model.final_layer_norm.weight": torch.ones(4),
        "text_projection.weight": torch.ones(24, 4),
        "visual_projection.weight": torch.ones(24, vision.hidden_size),
        "logit_scale": torch.tensor(2.6592),
    }
    write_weights(folder, tensors, fmt=fmt, sharded=False)
    write_json(folder / "config.json", {"model_type": "clip", "projection_dim": 24, "vision_config": clip_config(vision)})
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": vision.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": MEAN,
            "image_std": STD,
            "resample": 3,
            "size": vision.image_size,
        },
    )
