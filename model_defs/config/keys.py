"""Reading a config section while noting which of its keys were used."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .types import ConfigError

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


class Keys:
    """A config section that knows which of its keys were read."""

    def __init__(self, data: Mapping[str, Any], where: str, ignored: Collection[str]) -> None:
        self.data, self.where, self.ignored = data, where, ignored
        self.seen: set[str] = set()
        self.sections: dict[str, Keys] = {}

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

    def section(self, name: str) -> Keys:
        """The object under `name`; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: {name} is {type(value).__name__}; expected an object")
        return self.sections.setdefault(name, Keys(value, f"{self.where}, {name}", self.ignored))

    def finish(self) -> None:
        """Refuse keys that nobody read, here and in every section."""
        for section in self.sections.values():
            section.finish()
        unknown = sorted(set(self.data) - self.seen - INERT_KEYS - set(self.ignored))
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown keys {', '.join(unknown)}; they may change the computation. If they do not, "
                f"compile with --ignore-config-keys {','.join(unknown)}"
            )


def load_config(folder: Path) -> dict[str, Any]:
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


def bos_eos(*sections: Keys, default: tuple[int, int] = (1, 2)) -> tuple[int, tuple[int, ...]]:
    """Token ids from the first section that has them, else the default (Llama's); an eos may be an id or a list."""
    bos = [s.get("bos_token_id") for s in sections]
    eos = [s.get("eos_token_id") for s in sections]
    for section in sections:
        section.get("pad_token_id")
    found = next((e for e in eos if e is not None), default[1])
    return next((b for b in bos if b is not None), default[0]), tuple(found) if isinstance(found, list) else (found,)


def select(keys: Keys, name: str, choices: Mapping[str, Any], default: str = "default") -> Any:
    """What the value under `name` stands for; another value is an error."""
    value = keys.get(name, default)
    if value not in choices:
        raise ConfigError(f"{keys.where}: {name} is {value!r}; supported: {', '.join(map(repr, choices))}")
    return choices[value]
