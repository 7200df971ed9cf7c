"""Reading a config section while noting which of its keys were used."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .json_files import irregular, parse_object
from .types import ConfigError

# Keys that never change what is computed at inference: bookkeeping, training, choices between kernels of one result, and
# generation defaults that generation_config.json owns.
INERT_KEYS = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation auto_map bad_words_ids base_model_pp_plan base_model_tp_plan
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id freeze_mm_mlp_adapter
    freeze_mm_vision_resampler gradient_checkpointing id2label ignore_index image_seq_length initializer_factor
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty max_length
    min_length mm_projector_lr mm_vision_tower_lr name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix pretraining_tp problem_type
    projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    tokenizer_model_max_length tokenizer_padding_side top_k top_p torch_dtype torchscript tp_plan
    transformers.js_config transformers_version tune_mm_mlp_adapter tune_mm_vision_resampler typical_p
    unfreeze_mm_vision_tower use_bfloat16 use_cache use_flash_attention_2 use_flash_attn use_mm_proj""".split()
)
INERT_PREFIXES = ("unsloth_",)  # of training tools that store their own settings in a config

# Bounds far above every model: a wrong size could otherwise take all memory before it is checked.
LARGEST_SIZE = 1 << 24
MOST_LAYERS = 1 << 12
MOST_PIXELS = 1 << 13
MOST_TILES = 1 << 6


class Keys:
    """A config section that knows which of its keys were read.

    `notes`, shared by all sections of a config, are sentences about settings that contradict each other.
    """

    def __init__(
        self, data: Mapping[str, Any], where: str, ignored: Collection[str] = (), notes: list[str] | None = None
    ) -> None:
        self.data, self.where, self.ignored = data, where, ignored
        self.notes: list[str] = [] if notes is None else notes
        self.name = where.rpartition(", ")[2]
        self.seen: set[str] = set()
        self.sections: dict[str, Keys] = {}

    def get(self, name: str, default: Any = None, *, also: Iterable[str] = ()) -> Any:
        """The value under `name`, else that under one of the other spellings, else `default`; null counts as absent."""
        return self._entry(name, default, also)[1]

    def _entry(self, name: str, default: Any, also: Iterable[str]) -> tuple[str, Any]:
        """The spelling that counts and its value."""
        names = (name, *also)
        self.seen.update(names)
        entries = [(key, self.data[key]) for key in names if self.data.get(key) is not None]
        for key, value in entries[1:]:
            if value != entries[0][1]:
                self.notes.append(
                    f"{self.where}: {entries[0][0]} is {entries[0][1]!r:.100} but {key} is {value!r:.100}; the first counts"
                )
        return entries[0] if entries else (name, default)

    def size(self, name: str, default: int | None = None, *, also: Iterable[str] = (), most: int = LARGEST_SIZE) -> int:
        name, value = self._entry(name, default, also)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: {name} is {value!r:.200}; expected a positive integer")
        if value > most:
            raise ConfigError(f"{self.where}: {name} is {value!r:.200}; expected at most {most}: correct the file")
        return value

    def number(self, name: str, default: float | None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConfigError(f"{self.where}: {name} is {value!r:.200}; expected a positive number")
        return float(value)

    def numbers(self, name: str, default: list[int]) -> tuple[int, ...]:
        """A list of whole numbers from 0 on."""
        value = self.get(name, default)
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
            raise ConfigError(f"{self.where}: {name} is {value!r:.200}; expected a list of whole numbers")
        return tuple(value)

    def only(self, name: str, *allowed: Any) -> None:
        """Raise ConfigError for a setting with another value than those `allowed`."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{self.where}: {name} is {value!r:.200}; supported: {', '.join(map(repr, allowed))}")

    def section(self, name: str) -> Keys:
        """The object under `name`; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name} is {type(value).__name__}; expected an object")
        return self.sections.setdefault(name, Keys(value, f"{self.where}, {name}", self.ignored, self.notes))

    def overruled_by(self, section: Keys) -> None:
        """Note keys of `section` that are here too: those of the section count. Called after all keys are read."""
        for key in sorted((self.data.keys() & section.seen) - self.seen):
            own, counting = self.get(key), section.data.get(key)
            if own is not None and own != counting:
                value = "not there, and its default" if counting is None else f"{counting!r:.100}, which"
                self.notes.append(f"{self.where}: {key} is {own!r:.100}, but in {section.name} it is {value} counts")

    def finish(self) -> None:
        """Raise ConfigError for keys that were not read, here and in every section; keys without a value are ignored."""
        for section in self.sections.values():
            section.finish()
        keys = {key for key, value in self.data.items() if value is not None and not key.startswith(INERT_PREFIXES)}
        unknown = sorted(keys - self.seen - INERT_KEYS - set(self.ignored))
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown keys {', '.join(unknown):.200}; they may change the computation. If they do not, "
                f"compile with --ignore-config-keys {','.join(unknown):.200}"
            )


def load_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if reason := irregular(folder):
        raise ConfigError(reason)
    if not path.is_file():
        raise ConfigError(f"{folder} holds no config.json; expected a checkpoint folder as saved by transformers or by LLaVA")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ConfigError for anything else."""
    return parse_object(path.read_bytes(), path)


def bos_eos(*sections: Keys, default: tuple[int, int] = (1, 2)) -> tuple[int, tuple[int, ...]]:
    """Token ids from the first section that has them, else the default (Llama's); an eos may be an id or a list."""
    for section in sections:
        section.get("pad_token_id")
    bos, eos = (_first(sections, name, value) for name, value in zip(("bos_token_id", "eos_token_id"), default, strict=True))
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    for name, value in (("bos_token_id", bos), *(("eos_token_id", end) for end in ends)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{sections[0].where}: {name} is {value!r:.200}; expected a token id")
    return bos, ends


def _first(sections: Iterable[Keys], name: str, default: Any) -> Any:
    """The value of the first section that has one; a different value in another section is noted."""
    pairs = [(section, value) for section in sections if (value := section.get(name)) is not None]
    for section, value in pairs[1:]:
        if value != pairs[0][1]:
            section.notes.append(
                f"{section.where}: {name} is {value!r:.100} but in {pairs[0][0].where} it is {pairs[0][1]!r:.100}, which counts"
            )
    return pairs[0][1] if pairs else default


def select(keys: Keys, name: str, choices: Mapping[str, Any], default: str = "default") -> Any:
    """The choice that the value under `name` stands for; another value is an error."""
    value = keys.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{keys.where}: {name} is {value!r:.200}; supported: {', '.join(map(repr, choices))}")
    return choices[value]
