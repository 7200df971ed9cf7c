"""Tiny Llama-3.2-Vision checkpoints with random weights, written as the published ones are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from .checkpoints import MEAN, STD
from .checkpoints_files import randomise, save_pretrained, write_json, write_weights
from .checkpoints_tokenizers import FLAGS, LLAMA3_SPECIALS, llama3_tokenizer, llama3_vocabulary, write_tiktoken

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
# The rule of the published template, without tools: today's date in a system block unless there are images, then each turn
# between headers, its parts in order.
TEMPLATE = (
    "{{- bos_token }}"
    "{%- set system = '' %}"
    "{%- if messages[0].role == 'system' %}"
    "{%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}"
    "{%- endif %}"
    "{%- set found = namespace(pictures=false) %}"
    "{%- for m in messages %}{%- for part in m.content if part.type == 'image' %}{%- set found.pictures = true %}{%- endfor %}"
    "{%- endfor %}"
    "{%- if found.pictures and system %}{{- raise_exception('no system message with pictures') }}{%- endif %}"
    "{%- if not found.pictures %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}"
    "{%- for part in m.content %}{{- '<|image|>' if part.type == 'image' else part.text }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyMllama:
    """A checkpoint on disk and the same weights as a transformers model."""

    folder: Path
    model: MllamaForConditionalGeneration  # float32, eval mode
    image_token_id: int


def tiny_mllama(
    folder: Path,
    *,
    seed: int = 0,
    base: bool = False,
    tokenizer: Literal["json", "tiktoken"] = "json",
    fmt: Literal["safetensors", "bin"] = "safetensors",
    sharded: bool = False,
    names: Literal["new", "old", "saved"] = "old",
    dtype: torch.dtype = torch.float32,
    cross_layers: tuple[int, ...] = (1, 3),
    taps: tuple[int, ...] = (0, 2, 3),
    **dims: int,
) -> TinyMllama:
    """Write a tiny Llama-3.2-Vision into `folder` and return it with its transformers model.

    `base`: a model without a chat template, for plain text; else an Instruct model. `tokenizer`: the same ids from
    tokenizer.json or from a tokenizer.model in tiktoken's form. `names`, `dtype` as in tiny_llava. `dims` overrides any of
    hidden, layers, heads, kv_heads, intermediate, context, original_context, vision_hidden, vision_layers, global_layers,
    vision_heads, vision_intermediate, image_size, patch_size. The vocabulary is the tokenizer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _model(_known(dims), seed, base, cross_layers, taps)
    for value in model.state_dict().values():
        value.copy_(value.to(dtype))
    if names == "saved":
        assert fmt == "safetensors", "save_pretrained writes safetensors only"
        save_pretrained(folder, model, sharded, dtype)
    else:
        spell = _hub_name if names == "old" else str
        write_weights(folder, {spell(k): v.to(dtype) for k, v in model.state_dict().items()}, fmt=fmt, sharded=sharded)
    _write_config(folder, model, dtype)
    _write_tokenizer(folder, base, tokenizer)
    _write_preprocessor(folder, cast(Any, model.config.vision_config).image_size)
    return TinyMllama(folder, model, model.config.image_token_index)


def token_ids() -> dict[str, int]:
    """Ids of the special tokens; "<|image|>" is the first after the vocabulary of lm_head."""
    return {token: len(llama3_vocabulary()) + i for i, token in enumerate(LLAMA3_SPECIALS)}


def _known(dims: dict[str, int]) -> dict[str, int]:
    known = {
        "hidden": 64, "layers": 5, "heads": 4, "kv_heads": 2, "intermediate": 112, "context": 1024, "original_context": 64,
        "vision_hidden": 32, "vision_layers": 4, "global_layers": 2, "vision_heads": 2, "vision_intermediate": 48,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    assert not dims.keys() - known.keys(), dims.keys() - known.keys()
    return known | dims


def _model(
    d: dict[str, int], seed: int, base: bool, cross_layers: tuple[int, ...], taps: tuple[int, ...]
) -> MllamaForConditionalGeneration:
    ids = token_ids()
    # A small theta and few original positions, so that scaling changes angles by much within a short text.
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": d["original_context"],
    }  # fmt: skip
    text = MllamaTextConfig(
        vocab_size=ids["<|image|>"], hidden_size=d["hidden"], num_hidden_layers=d["layers"], num_attention_heads=d["heads"],
        num_key_value_heads=d["kv_heads"], intermediate_size=d["intermediate"], rms_norm_eps=1e-5, rope_parameters=rope,
        max_position_embeddings=d["context"], cross_attention_layers=list(cross_layers), tie_word_embeddings=False,
        bos_token_id=ids["<|begin_of_text|>"], eos_token_id=_ends(base), pad_token_id=ids["<|finetune_right_pad_id|>"],
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=d["vision_hidden"], num_hidden_layers=d["vision_layers"], num_global_layers=d["global_layers"],
        attention_heads=d["vision_heads"], intermediate_size=d["vision_intermediate"], image_size=d["image_size"],
        patch_size=d["patch_size"], norm_eps=1e-5, max_num_tiles=4, intermediate_layers_indices=list(taps),
        vision_output_dim=d["vision_hidden"] * (1 + len(taps)), supported_aspect_ratios=RATIOS,
    )  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids["<|image|>"])
    return randomise(MllamaForConditionalGeneration(config), seed)


def _ends(base: bool) -> int | list[int]:
    ids = token_ids()
    return ids["<|end_of_text|>"] if base else [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]


def _hub_name(name: str) -> str:
    """transformers' name in memory -> the name on the hub."""
    for ours, theirs in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def _write_config(folder: Path, model: MllamaForConditionalGeneration, dtype: torch.dtype) -> None:
    config = cast(Any, model.config)
    text, vision = config.text_config, config.vision_config
    stale = {"max_length": 20, "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # left behind by old savers
    scaling = dict(text.rope_parameters)
    theta = scaling.pop("rope_theta")
    copied = (
        "bos_token_id", "cross_attention_layers", "eos_token_id", "hidden_size", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
        "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    seen = (
        "attention_heads", "hidden_size", "image_size", "intermediate_layers_indices", "intermediate_size", "max_num_tiles",
        "norm_eps", "num_channels", "num_global_layers", "num_hidden_layers", "patch_size", "supported_aspect_ratios",
        "vision_output_dim",
    )  # fmt: skip
    write_json(
        folder / "config.json",
        {
            "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": config.image_token_index,
            "model_type": "mllama",
            "text_config": {
                "dropout": 0,
                "hidden_act": "silu",
                "initializer_range": 0.02,
                "model_type": "mllama_text_model",
                "rope_scaling": scaling,
                "rope_theta": theta,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "use_cache": True,
                **{name: getattr(text, name) for name in copied},
                **stale,
            },
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vision_config": {
                "hidden_act": "gelu",
                "initializer_range": 0.02,
                "model_type": "mllama_vision_model",
                "tie_word_embeddings": True,
                "torch_dtype": "bfloat16",
                **{name: getattr(vision, name) for name in seen},
                **stale,
            },
        },
    )


def _write_tokenizer(folder: Path, base: bool, form: str) -> None:
    if form == "json":
        llama3_tokenizer().save(str(folder / "tokenizer.json"))
    else:
        write_tiktoken(folder / "tokenizer.model", llama3_vocabulary())
    ids = token_ids()
    special = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>" if base else "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    config = {
        "added_tokens_decoder": {str(i): {"content": token, **FLAGS, "special": True} for token, i in ids.items()},
        **special,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config if base else {"chat_template": TEMPLATE, **config})
    write_json(folder / "special_tokens_map.json", {key: {"content": token, **FLAGS} for key, token in special.items()})
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|begin_of_text|>"],
            "do_sample": True,
            "eos_token_id": _ends(base),
            "pad_token_id": ids["<|finetune_right_pad_id|>"],
            "temperature": 0.6,
            "top_p": 0.9,
        },
    )
    if not base:
        write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})


def _write_preprocessor(folder: Path, side: int) -> None:
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN,
            "image_processor_type": "MllamaImageProcessor",
            "image_std": STD,
            "max_image_tiles": 4,
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": side, "width": side},
        },
    )
