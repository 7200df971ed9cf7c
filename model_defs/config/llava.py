"""LLaVA-1.5 and 1.6 (vicuna): config.json as llava-hf and as the original repository write it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ..clip_sizes import KNOWN_TOWERS
from .keys import MOST_LAYERS, MOST_PIXELS, Keys, bos_eos, load_config, select
from .llama import llama
from .types import ClipConfig, ConfigError, ModelConfig

# transformers' LlavaNextConfig: (height, width) in pixels, tried in this order.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
FULL = {"default": False, "full": True}


def read_llava(keys: Keys, checkpoint: Path, vision_tower: Path | None) -> ModelConfig:
    """The config of either family in either layout; a model_type of "llava" alone does not distinguish them."""
    if "text_config" in keys.data or "vision_config" in keys.data:
        return _hf(keys)
    return _original(keys, checkpoint, vision_tower)


def _hf(keys: Keys) -> ModelConfig:
    next_generation = keys.get("model_type") == "llava_next"
    text_keys = keys.section("text_config")
    text_keys.only("model_type", "llama")
    text = llama(text_keys, newline=next_generation)
    bos, eos = bos_eos(keys, text_keys)
    keys.only("tie_word_embeddings", False)
    keys.only("projector_hidden_act", "gelu")
    vision_keys = keys.section("vision_config")
    vision_keys.only("model_type", "clip_vision_model")
    if next_generation:
        # The grid of patches is unpadded, and a class token has no place in a grid.
        keys.only("vision_feature_select_strategy", "default")
        keys.only("use_image_newline_parameter", True)
    vision = _clip(
        vision_keys,
        layer=keys.get("vision_feature_layer", -2),
        keep_class_token=select(keys, "vision_feature_select_strategy", FULL),
    )
    grids = _grids(keys, keys.get("image_grid_pinpoints", PINPOINTS), vision, wide_first=False) if next_generation else ()
    image_token_id = keys.size("image_token_id", 32000, also=["image_token_index"])
    keys.overruled_by(text_keys)
    return ModelConfig(
        family="llava_next" if next_generation else "llava",
        layout="hf",
        text=text,
        vision=vision,
        projector_bias=bool(keys.get("multimodal_projector_bias", True)),
        image_token_id=image_token_id,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_mode="anyres" if next_generation else "crop",
        grids=grids,
    )


def _original(keys: Keys, checkpoint: Path, vision_tower: Path | None) -> ModelConfig:
    mode = select(keys, "image_aspect_ratio", {"pad": "pad", "square": "crop", "anyres": "anyres"}, default="square")
    anyres = mode == "anyres"
    text = llama(keys, newline=anyres)
    bos, eos = bos_eos(keys)
    keys.only("mm_projector_type", "mlp2x_gelu")
    keys.only("mm_use_im_start_end", False)
    keys.only("mm_use_im_patch_token", False)
    if anyres and keys.get("mm_patch_merge_type", "flat") != "spatial_unpad":
        raise ConfigError(
            f"{keys.where}: mm_patch_merge_type is {keys.get('mm_patch_merge_type')!r:.200} with image_aspect_ratio 'anyres'; "
            "supported: 'spatial_unpad'"
        )
    keys.only("mm_patch_merge_type", "spatial_unpad" if anyres else "flat")
    keys.only("mm_resampler_type", None)
    name = keys.get("mm_vision_tower", None, also=["vision_tower"])
    if name is None:
        raise ConfigError(f"{keys.where}: neither vision_config nor mm_vision_tower is present; expected a LLaVA checkpoint")
    vision = _clip(
        _tower_keys(name, checkpoint, vision_tower, keys),
        layer=keys.get("mm_vision_select_layer", -2),
        keep_class_token=select(keys, "mm_vision_select_feature", {"patch": False, "cls_patch": True}, default="patch"),
    )
    if anyres:
        keys.only("mm_vision_select_feature", "patch")
    if keys.size("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ConfigError(
            f"{keys.where}: mm_hidden_size is {keys.get('mm_hidden_size')} but the vision tower {vision_tower or name} has "
            f"hidden_size {vision.hidden_size}; give the tower that the model was trained with"
        )
    pinpoints = keys.get("image_grid_pinpoints", PINPOINTS)
    for unused in ("image_crop_resolution", "image_split_resolution"):  # of other ways to cut images
        keys.get(unused)
    return ModelConfig(
        family="llava_next" if anyres else "llava",
        layout="original",
        text=text,
        vision=vision,
        image_token_id=None,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_mode=mode,
        grids=_grids(keys, pinpoints, vision, wide_first=True) if anyres else (),
        vision_tower=name,
    )


def _grids(keys: Keys, pinpoints: Any, vision: ClipConfig, *, wide_first: bool) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints as (rows, columns) of tiles, in order.

    The original code reads a pair as (width, height), transformers as (height, width); some old files hold the list as text.
    """
    where = f"{keys.where}: image_grid_pinpoints is {pinpoints!r:.200}"
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"{where}; expected a list of pairs of pixels") from error
    side = vision.image_size
    grids = []
    for pair in pinpoints if isinstance(pinpoints, list | tuple) else [None]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise ConfigError(f"{where}; expected a list of pairs of pixels")
        if any(n % side for n in pair):
            raise ConfigError(f"{where}; expected multiples of the vision tower's image_size {side}")
        first, second = (n // side for n in pair)
        grids.append((second, first) if wide_first else (first, second))
    if not grids:
        raise ConfigError(f"{where}; expected at least one pair")
    return tuple(grids)


def _tower_keys(name: str, checkpoint: Path, vision_tower: Path | None, keys: Keys) -> Keys:
    """The vision_config of a tower: from its own folder, a folder of that name, or built-in sizes."""
    folder = vision_tower or next((p for p in (Path(name), checkpoint / name) if (p / "config.json").is_file()), None)
    if folder is None:
        if name not in KNOWN_TOWERS:
            raise ConfigError(
                f"{keys.where}: the vision tower {name!r:.200} is not a folder here; give its folder with --vision-tower PATH"
            )
        return Keys(KNOWN_TOWERS[name], f"built-in sizes of {name}", keys.ignored, keys.notes)
    whole = Keys(load_config(folder), str(folder / "config.json"), keys.ignored, keys.notes)
    own = whole.section("vision_config")
    tower = own if own.data else whole
    keys.sections["vision tower"] = tower  # its keys are checked with the others
    return tower


def _clip(keys: Keys, *, layer: Any, keep_class_token: bool) -> ClipConfig:
    """Defaults are those of transformers' CLIPVisionConfig; `layer` indexes hidden states, 0 = before the first layer."""
    layers = keys.size("num_hidden_layers", 12, most=MOST_LAYERS)
    if not isinstance(layer, int):
        raise ConfigError(f"{keys.where}: the vision feature layer is {layer!r:.200}; only a single integer is supported")
    keys.only("num_channels", 3)
    for unused in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "model_type"):
        keys.get(unused)
    return ClipConfig(
        hidden_size=keys.size("hidden_size", 768),
        layers=layers,
        used_layers=layer if layer >= 0 else layers + 1 + layer,
        heads=keys.size("num_attention_heads", 12),
        intermediate_size=keys.size("intermediate_size", 3072),
        image_size=keys.size("image_size", 224, most=MOST_PIXELS),
        patch_size=keys.size("patch_size", 32),
        layer_norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.get("hidden_act", "quick_gelu"),
        keep_class_token=keep_class_token,
    )
