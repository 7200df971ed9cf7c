"""Tiny checkpoints with random weights, written file by file as the published ones are, for tests to compile and compare."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

SENTENCES = (
    "What is in the picture? A red circle and a blue square.",
    "Describe the image in English: two green triangles lie on a white table.",
    "How many shapes are there? There are three shapes, and the largest one is yellow.",
    "Please provide the box of the region this sentence describes: the small black star at [0.61, 0.36, 0.92, 0.83].",
    "USER: Hello! ASSISTANT: Hi, please show me a picture. USER: Which colour has the circle? ASSISTANT: Orange.",
    'The quick brown fox jumps over the lazy dog; 1234567890 times, it says. (Really?) Yes - why not: "of course".',
    "A chat between a curious user and an artificial intelligence assistant, who gives helpful and polite answers.",
)
# The rule of the published template in other words: ROLE, pictures, then texts, a space after every text.
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
VOCAB = 389
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A checkpoint on disk and the same weights as a transformers model."""

    folder: Path
    model: LlavaForConditionalGeneration  # float32, eval mode
    image_token_id: int  # hf: `<image>`. original: <unk>, which no text yields, stands for a picture in `model`
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
    model = tiny_model(seed, image_token_id=0 if original else _hf_tokenizer().token_to_id("<image>"), **dims)
    for value in model.state_dict().values():
        value.copy_(value.to(dtype))
    if original:
        tower = write_original(folder, model, fmt=fmt, sharded=sharded, dtype=dtype)
        return Tiny(folder, model, 0, tower)
    write_hf(folder, model, fmt=fmt, sharded=sharded, names=names, dtype=dtype)
    return Tiny(folder, model, model.config.image_token_id, None)


def tiny_model(seed: int, image_token_id: int, **dims: int) -> LlavaForConditionalGeneration:
    """A random model whose logits differ clearly from token to token: larger weights than a real model's at this width."""
    known = {
        "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 112, "vocab": VOCAB,
        "context": 512, "vision_hidden": 32, "vision_layers": 3, "vision_heads": 2, "vision_intermediate": 48,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    assert not dims.keys() - known.keys(), dims.keys() - known.keys()
    d = known | dims
    text = LlamaConfig(
        vocab_size=d["vocab"], hidden_size=d["hidden"], num_hidden_layers=d["layers"], num_attention_heads=d["heads"],
        num_key_value_heads=d["kv_heads"], head_dim=d["head_dim"], intermediate_size=d["intermediate"],
        max_position_embeddings=d["context"], rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=d["vision_hidden"], num_hidden_layers=d["vision_layers"], num_attention_heads=d["vision_heads"],
        intermediate_size=d["vision_intermediate"], image_size=d["image_size"], patch_size=d["patch_size"], projection_dim=24,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_token_id, image_token_id=image_token_id,
        image_seq_length=(d["image_size"] // d["patch_size"]) ** 2, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        norm = "norm" in name and name.endswith(".weight")
        value.copy_(1 + 0.2 * noise if norm else (0.3 if name.endswith("embed_tokens.weight") else 0.15) * noise)
    return model


# --- Hugging Face layout -----------------------------------------------------------------------------------------------


def write_hf(
    folder: Path, model: LlavaForConditionalGeneration, *, fmt: str, sharded: bool, names: str, dtype: torch.dtype
) -> None:
    """The files of a llava-hf repository."""
    if names == "saved":
        _save_pretrained(folder, model, sharded, dtype)
        assert fmt == "safetensors", "save_pretrained writes safetensors only"
    else:
        spell = hub_name if names == "old" else str
        write_weights(folder, {spell(k): v.to(dtype) for k, v in model.state_dict().items()}, fmt=fmt, sharded=sharded)
    tokenizer, config = _hf_tokenizer(), cast(Any, model.config)
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
            "text_config": {"model_type": "llama", "torch_dtype": "float16", **_sizes(text), "head_dim": text.head_dim},
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "vision_config": _vision_config(vision),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": text.vocab_size,
        },
    )
    _write_hf_tokenizer(folder, tokenizer)
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


def _save_pretrained(folder: Path, model: LlavaForConditionalGeneration, sharded: bool, dtype: torch.dtype) -> None:
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.to(dtype).save_pretrained(folder, max_shard_size=_shard_limit(model.state_dict()) if sharded else "5GB")
    finally:
        model.float()
        if bar:
            transformers_logging.enable_progress_bar()


@cache
def _hf_tokenizer() -> Tokenizer:
    """BPE with byte fallback, "▁" for spaces, BOS put before; <image> and <pad> come last."""
    letters = sorted(set("".join(SENTENCES)) - {" "} | {"▁"})
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=len(letters) + 40, initial_alphabet=letters, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in sorted(learned["vocab"], key=learned["vocab"].__getitem__):
        vocab.setdefault(piece, len(vocab))
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    assert tokenizer.get_vocab_size() < VOCAB, "as on the hub, the last rows of the embedding table belong to no token"
    return tokenizer


def _write_hf_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    added = {tokenizer.token_to_id(t): {"content": t, **FLAGS, "special": True} for t in (*special.values(), "<image>")}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added[i] for i in sorted(added)},
        **special,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {key: {"content": t, **FLAGS} for key, t in special.items()})
    write_json(folder / "added_tokens.json", {t: tokenizer.token_to_id(t) for t in ("<image>", "<pad>")})
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


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
            **_sizes(text),
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
    (folder / "tokenizer.model").write_bytes(_sentencepiece())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **{key: {"__type": "AddedToken", "content": token, **FLAGS} for key, token in special.items()},
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": text.max_position_embeddings // 2,
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    write_json(
        folder / "special_tokens_map.json", {k: {"content": t, **FLAGS} for k, t in special.items()} | {"pad_token": "<unk>"}
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": text.max_position_embeddings}
    write_json(folder / "generation_config.json", ids)
    _write_clip(tower, apart, vision, fmt)
    return tower


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


def _write_clip(folder: Path, tensors: dict[str, Tensor], vision: Any, fmt: str) -> None:
    """A CLIP checkpoint of the old form: a config for both towers, integer sizes for pictures, an integer buffer."""
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
    write_json(folder / "config.json", {"model_type": "clip", "projection_dim": 24, "vision_config": _vision_config(vision)})
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


@cache
def _sentencepiece() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


# --- Files -------------------------------------------------------------------------------------------------------------


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


def _sizes(text: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "vocab_size",
    )  # fmt: skip
    return {key: getattr(text, key) for key in keys}


def _vision_config(vision: Any) -> dict[str, Any]:
    keys = (
        "hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size",
        "projection_dim",
    )  # fmt: skip
    return {"model_type": "clip_vision_model", **{key: getattr(vision, key) for key in keys}}
