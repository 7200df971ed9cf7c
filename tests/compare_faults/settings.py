"""Settings that differ: in a checkpoint's config.json, or in the manifest of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from staticvl.runtime.artifact import Llama3Scaling, ModelInfo

from ..seeded import with_facts
from .fault import Base, Fault, Seeding

LLAVA, NEXT, MLLAMA, QWEN = (Base(family) for family in ("llava", "llava_next", "mllama", "qwen_vl"))
replace = msgspec.structs.replace
QUICK: dict[str, Any] = {"with_edges": False, "inspect": "never"}


def config(**changes: Any) -> Callable[[Seeding], None]:
    """Another config of the reference; `section__key` is a key of a section."""

    def edit(data: dict[str, Any]) -> None:
        for name, value in changes.items():
            *sections, key = name.split("__")
            target = data
            for section in sections:
                target = target[section]
            target[key] = value

    return lambda place: place.change_checkpoint(edit)


def info(change: Callable[[ModelInfo], ModelInfo]) -> Callable[[Seeding], object]:
    return lambda place: with_facts(place.copy(), change)


def image(**changes: Any) -> Callable[[Seeding], object]:
    return info(lambda model: replace(model, image=replace(model.image, **changes)))


def reversed_colours(model: ModelInfo) -> ModelInfo:
    return replace(model, image=replace(model.image, mean=model.image.mean[::-1], std=model.image.std[::-1]))


def fault(name: str, base: Base, seed: Callable[[Seeding], object], where: str, says: str = "", **more: Any) -> Fault:
    return Fault(
        name=name,
        base=base,
        seed=seed,
        stage="settings",
        where=where,
        says=says,
        **({"settings": QUICK, "samples": ("text 2",)} | more),
    )


FAULTS = (
    fault("rms_norm_eps", LLAVA, config(text_config__rms_norm_eps=1e-3), r"text\.rms_norm_eps",
          "1e-05; the reference has 0.001: the epsilon of the decoder's norms: rms_norm_eps", quick=True),
    fault("layer_norm_epsilon of Qwen-VL", QWEN, config(layer_norm_epsilon=1e-4), r"text\.rms_norm_eps", "layer_norm_epsilon"),
    fault("epsilon of the vision tower, hidden by numbers", LLAVA, config(vision_config__layer_norm_eps=1e-6),
          r"vision\.layer_norm_eps", "1e-05; the reference has 1e-06"),
    fault("norm_eps of Llama-3.2's tower", MLLAMA, config(vision_config__norm_eps=1e-4), r"vision\.norm_eps"),
    fault("hidden_act of the vision tower", LLAVA, config(vision_config__hidden_act="gelu"), r"vision\.activation",
          "hidden_act"),
    fault("twice as many heads over the same weights", LLAVA,
          config(text_config__num_attention_heads=8, text_config__num_key_value_heads=4, text_config__head_dim=16),
          r"text\.(heads|head_dim|kv_heads)"),
    fault("heads of the vision tower", LLAVA, config(vision_config__num_attention_heads=2), r"vision\.heads"),
    fault("vision feature layer", LLAVA, config(vision_feature_layer=-1), r"vision\.used_layers", "vision_feature_layer"),
    fault("mean of colours", LLAVA, image(mean=(0.5, 0.5, 0.5)), r"image\.mean"),
    fault("rope_theta", LLAVA, info(lambda model: replace(model, rope=replace(model.rope, theta=5e5))), r"rope\.theta"),
    fault("rotary scaling of Llama-3", MLLAMA, info(lambda model: replace(model, rope=replace(model.rope, llama3=Llama3Scaling(
          factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=64)))), r"rope\.llama3.*"),
    fault("resize filter", LLAVA, image(resample=2), r"image\.resample", "resize filter is bilinear, where bicubic is right"),
    fault("colours normalised as BGR", LLAVA, info(reversed_colours), r"image\.mean", "channel order is reversed"),
    fault("rescaling of pixels", QWEN, image(rescale=1 / 256), r"image\.rescale"),
    fault("end of an answer", LLAVA, info(lambda model: replace(model, eos_token_ids=(5,))), r"eos_token_ids"),
    fault("tokens before the text", LLAVA, info(lambda model: replace(
          model, tokenizer=replace(model.tokenizer, add_bos=not model.tokenizer.add_bos))), r"tokenizer\.add_bos"),
    fault("grids of LLaVA-1.6 in another order", NEXT, info(
          lambda model: replace(model, image=replace(model.image, grids=model.image.grids[::-1]))), r"image\.grids"),
    fault("logn attention switched off", QWEN, config(use_logn_attn=False), r"rope\.logn_positions"),
)  # fmt: skip
