"""A checkpoint's config.json, read into frozen dataclasses.

Everything about sizes comes from the checkpoint's own files; where a published file leaves a value out, the default is
the one that the model's own code uses (Llama and CLIP defaults, noted beside each). Old and new spellings are accepted.
A key that is neither used nor known to leave the computation alone is an error: a setting that we do not understand may
change the numbers.

Only the standard library is used here, so that planning a build needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .clip_sizes import KNOWN_TOWERS


class ConfigError(ValueError):
    """A config file that cannot be compiled as it stands; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Sizes of the decoder (Llama architecture)."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of lm_head
    embed_rows: int  # rows of the embedding table
    rms_norm_eps: float
    rope_theta: float
    max_positions: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"num_attention_heads {self.heads} is not a multiple of num_key_value_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary position embedding needs an even head_dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of a CLIP vision tower and which of its layers feed the language model."""

    hidden_size: int
    layers: int  # layers in the checkpoint
    used_layers: int  # layers that are run: the selected hidden state is the output of the last of them
    heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: str  # quick_gelu | gelu
    keep_class_token: bool

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if not 1 <= self.used_layers <= self.layers:
            raise ConfigError(
                f"vision_feature_layer selects {self.used_layers} of {self.layers} vision layers; expected 1 to {self.layers}"
            )
        if self.activation not in ("quick_gelu", "gelu"):
            raise ConfigError(f"vision hidden_act {self.activation!r} is not supported; expected quick_gelu or gelu")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_image(self) -> int:
        """Rows that one picture gives to the language model."""
        return self.patches + int(self.keep_class_token)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One vision-language model, whatever layout its checkpoint has."""

    family: str  # llava
    layout: str  # hf | original
    text: TextConfig
    vision: ClipConfig
    projector_bias: bool
    image_token_id: int | None  # None: the original layout marks pictures outside the vocabulary
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    image_mode: str  # crop (shortest edge, centre crop) | pad (to a square)
    vision_tower: str | None = None  # name or path given by an original-layout config


# Keys that never change what is computed at inference: bookkeeping, training, and generation defaults that
# generation_config.json owns.
INERT_KEYS = frozenset(
    """_name_or_path _commit_hash add_cross_attention architectures attention_dropout auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id freeze_mm_mlp_adapter freeze_mm_vision_resampler id2label
    ignore_index image_seq_length initializer_factor initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length mm_projector_lr mm_vision_tower_lr min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pretraining_tp prefix
    problem_type projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class tokenizer_model_max_length tokenizer_padding_side top_k top_p torch_dtype
    torchscript transformers_version tune_mm_mlp_adapter tune_mm_vision_resampler typical_p unfreeze_mm_vision_tower
    use_bfloat16 use_cache use_mm_proj""".split()
)


def quant_block(columns: int) -> int:
    """Weights of one row that share a scale when they are stored in 8 bits: 128, or 32 where rows do not divide by that."""
    return 128 if columns % 128 == 0 else 32


class _Keys:
    """A config section that knows which of its keys were read."""

    def __init__(self, data: Mapping[str, Any], where: str, ignored: Collection[str]) -> None:
        self.data, self.where, self.ignored = data, where, ignored
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None, *, also: Iterable[str] = ()) -> Any:
        """The value under `name` or one of the other spellings, else `default`; null counts as absent."""
        self.seen.update((name, *also))
        for key in (name, *also):
            if self.data.get(key) is not None:
                return self.data[key]
        return default

    def size(self, name: str, default: int | None = None, *, also: Iterable[str] = ()) -> int:
        value = self.get(name, default, also=also)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: {name} is {value!r}; expected a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: {name} is {value!r}; expected a positive number")
        return float(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a setting whose other values are not implemented."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{self.where}: {name} is {value!r}; supported: {', '.join(map(repr, allowed))}")

    def section(self, name: str) -> _Keys:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name} is {type(value).__name__}; expected an object")
        return _Keys(value, f"{self.where}, {name}", self.ignored)

    def finish(self) -> None:
        unknown = sorted(set(self.data) - self.seen - INERT_KEYS - set(self.ignored))
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown keys {', '.join(unknown)}; they may change the computation. If they do not, "
                f"compile with --ignore-config-keys {','.join(unknown)}"
            )


def read_config(checkpoint: Path, *, vision_tower: Path | None = None, ignore_keys: Collection[str] = ()) -> ModelConfig:
    """Read `checkpoint`/config.json; `vision_tower` is the folder of a tower stored apart (original layout).

    Raises ConfigError for a missing, malformed or unsupported config.
    """
    data = _load(checkpoint)
    keys = _Keys(data, str(checkpoint / "config.json"), ignore_keys)
    model_type = keys.get("model_type")
    if "quantization_config" in data:
        raise ConfigError(f"{keys.where}: quantization_config is set; expected an unquantised checkpoint (fp32, fp16 or bf16)")
    if model_type in ("llava", "llava_llama"):
        hf = "text_config" in data or "vision_config" in data
        config = _llava_hf(keys) if hf else _llava_original(keys, checkpoint, vision_tower)
        keys.finish()
        return config
    raise ConfigError(f"{keys.where}: model_type {model_type!r} is not supported; supported: llava")


def _load(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.json; expected a checkpoint folder as saved by transformers or by LLaVA")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ConfigError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a JSON object")
    return data


def _llava_hf(keys: _Keys) -> ModelConfig:
    text_keys = keys.section("text_config")
    text_keys.only("model_type", "llama")
    text = _llama(text_keys)
    bos, eos = _bos_eos(text_keys, keys)
    keys.get("pad_token_id")
    keys.get("vocab_size")  # repeats text_config's
    keys.only("tie_word_embeddings", False)
    keys.only("projector_hidden_act", "gelu")
    vision_keys = keys.section("vision_config")
    vision_keys.only("model_type", "clip_vision_model")
    vision = _clip(
        vision_keys,
        layer=keys.get("vision_feature_layer", -2),
        keep_class_token=_select(keys, "vision_feature_select_strategy", {"default": False, "full": True}),
    )
    text_keys.finish()
    vision_keys.finish()
    return ModelConfig(
        family="llava",
        layout="hf",
        text=text,
        vision=vision,
        projector_bias=bool(keys.get("multimodal_projector_bias", True)),
        image_token_id=keys.size("image_token_index", 32000, also=["image_token_id"]),
        bos_token_id=bos,
        eos_token_ids=eos,
        image_mode="crop",
    )


def _llava_original(keys: _Keys, checkpoint: Path, vision_tower: Path | None) -> ModelConfig:
    text = _llama(keys)
    bos, eos = _bos_eos(keys)
    keys.get("pad_token_id")
    keys.only("mm_projector_type", "mlp2x_gelu")
    keys.only("mm_use_im_start_end", False)
    keys.only("mm_use_im_patch_token", False)
    keys.only("mm_patch_merge_type", "flat")
    keys.only("mm_resampler_type", None)
    mode = _select(keys, "image_aspect_ratio", {"pad": "pad", "square": "crop"}, default="square")
    name = keys.get("mm_vision_tower", None, also=["vision_tower"])
    if name is None:
        raise ConfigError(f"{keys.where}: neither vision_config nor mm_vision_tower is present; expected a LLaVA checkpoint")
    vision = _clip(
        _tower_keys(name, checkpoint, vision_tower, keys),
        layer=keys.get("mm_vision_select_layer", -2),
        keep_class_token=_select(keys, "mm_vision_select_feature", {"patch": False, "cls_patch": True}, default="patch"),
    )
    if keys.size("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
        raise ConfigError(
            f"{keys.where}: mm_hidden_size is {keys.get('mm_hidden_size')} but the vision tower {vision_tower or name} has "
            f"hidden_size {vision.hidden_size}; give the tower that the model was trained with"
        )
    return ModelConfig(
        family="llava",
        layout="original",
        text=text,
        vision=vision,
        projector_bias=True,
        image_token_id=None,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_mode=mode,
        vision_tower=name,
    )


def _tower_keys(name: str, checkpoint: Path, vision_tower: Path | None, keys: _Keys) -> _Keys:
    """The vision_config of a tower: from the folder given, the name taken as a folder, or a tower known by name."""
    folder = vision_tower or next((p for p in (Path(name), checkpoint / name) if (p / "config.json").is_file()), None)
    if folder is None:
        if name not in KNOWN_TOWERS:
            raise ConfigError(
                f"{keys.where}: the vision tower {name!r} is not a folder here; give its folder with --vision-tower PATH"
            )
        return _Keys(KNOWN_TOWERS[name], f"built-in sizes of {name}", keys.ignored)
    data = _load(folder)
    return _Keys(data.get("vision_config", data), f"{folder / 'config.json'}, vision_config", keys.ignored)


def _llama(keys: _Keys) -> TextConfig:
    """Defaults are those of transformers' LlamaConfig; rms_norm_eps is given by every published file."""
    hidden, heads = keys.size("hidden_size", 4096), keys.size("num_attention_heads", 32)
    keys.only("hidden_act", "silu")
    keys.only("attention_bias", False)
    keys.only("mlp_bias", False)
    keys.only("tie_word_embeddings", False)
    vocab = keys.size("vocab_size", 32000)
    return TextConfig(
        hidden_size=hidden,
        layers=keys.size("num_hidden_layers", 32),
        heads=heads,
        kv_heads=keys.size("num_key_value_heads", heads),
        head_dim=keys.size("head_dim", hidden // heads),
        intermediate_size=keys.size("intermediate_size", 11008),
        vocab_size=vocab,
        embed_rows=vocab,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=_plain_rope_theta(keys),
        max_positions=keys.size("max_position_embeddings", 2048),
    )


def _plain_rope_theta(keys: _Keys) -> float:
    """rope_theta, from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    keys.only("rope_scaling", None)
    new = keys.section("rope_parameters")
    new.only("rope_type", "default")
    new.get("type")
    theta = keys.number("rope_theta", new.number("rope_theta", 10000.0))
    new.finish()
    return theta


def _clip(keys: _Keys, *, layer: Any, keep_class_token: bool) -> ClipConfig:
    """Defaults are those of transformers' CLIPVisionConfig; `layer` indexes hidden states, 0 = before the first layer."""
    layers = keys.size("num_hidden_layers", 12)
    if not isinstance(layer, int):
        raise ConfigError(f"{keys.where}: the vision feature layer is {layer!r}; only a single integer is supported")
    keys.only("num_channels", 3)
    for unused in ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "model_type"):
        keys.get(unused)
    return ClipConfig(
        hidden_size=keys.size("hidden_size", 768),
        layers=layers,
        used_layers=layer if layer >= 0 else layers + 1 + layer,
        heads=keys.size("num_attention_heads", 12),
        intermediate_size=keys.size("intermediate_size", 3072),
        image_size=keys.size("image_size", 224),
        patch_size=keys.size("patch_size", 32),
        layer_norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.get("hidden_act", "quick_gelu"),
        keep_class_token=keep_class_token,
    )


def _bos_eos(*sections: _Keys) -> tuple[int, tuple[int, ...]]:
    """Token ids from the first section that has them, else Llama's 1 and 2; an eos may be an id or a list."""
    bos = [s.get("bos_token_id") for s in sections]
    eos = [s.get("eos_token_id") for s in sections]
    for section in sections:
        section.get("pad_token_id")
    found = next((e for e in eos if e is not None), 2)
    return next((b for b in bos if b is not None), 1), tuple(found) if isinstance(found, list) else (found,)


def _select(keys: _Keys, name: str, choices: Mapping[str, Any], default: str = "default") -> Any:
    value = keys.get(name, default)
    if value not in choices:
        raise ConfigError(f"{keys.where}: {name} is {value!r}; supported: {', '.join(map(repr, choices))}")
    return choices[value]
