"""Default sampling settings: generation_config.json, as transformers reads it.

A setting that a file leaves out has transformers' own default, top_k for example. A setting that changes answers there and has
no counterpart here is noted, never dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import UNSET

from ..model_defs.config import ConfigError
from ..runtime.artifact import SamplingDefaults
from ..runtime.shown import quoted
from .json_values import integer, number

TOP_K = 50  # transformers' GenerationConfig, where a file is silent
TAKEN = frozenset(
    """bad_words_ids begin_suppress_tokens chat_format do_sample eos_token_id min_p repetition_penalty suppress_tokens
    temperature top_k top_p""".split()
)
LENGTHS = "max_length max_new_tokens max_window_size".split()  # a request says how long its answer may be
# Settings without a counterpart -> the value that changes nothing.
NEUTRAL: Mapping[str, Any] = {
    "constraints": None,
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}
# Bookkeeping, what is returned, how it is computed, and settings of beam search alone.
INERT = frozenset(
    """_from_model_config assistant_confidence_threshold assistant_early_exit assistant_lookbehind bos_token_id cache_config
    cache_implementation compile_config continuous_batching_config decoder_start_token_id disable_compile early_stopping
    generation_kwargs is_assistant length_penalty low_memory max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores pad_token_id
    prefill_chunk_size prompt_lookup_num_tokens return_dict_in_generate target_lookbehind transformers_version
    trust_remote_code use_cache""".split()
)


def read_sampling(path: Path, generation: Mapping[str, Any], eos: Iterable[int], notes: list[str]) -> SamplingDefaults:
    """The defaults of requests; `notes` gains a sentence about settings that are not used. Raises ConfigError."""
    where, default = str(path), SamplingDefaults()
    do_sample = generation.get("do_sample")
    if not isinstance(do_sample, bool | None):
        raise ConfigError(f"{where}: do_sample is {quoted(do_sample)}; expected true or false")
    notes += _unused(where, generation)
    return SamplingDefaults(
        do_sample=bool(do_sample),
        temperature=number(generation, "temperature", default.temperature, where, least=0),
        top_p=_share(number(generation, "top_p", default.top_p, where, above=0), "top_p", where),
        top_k=integer(generation, "top_k", TOP_K, where, least=0),
        min_p=_share(number(generation, "min_p", 0.0, where, least=0), "min_p", where) or UNSET,
        repetition_penalty=_unless(1.0, number(generation, "repetition_penalty", 1.0, where, above=0)),
        bad_words_ids=_bad_words(generation, where, [(token,) for token in eos]) or UNSET,
        suppress_tokens=_ids(generation.get("suppress_tokens") or [], "suppress_tokens", where) or UNSET,
        begin_suppress_tokens=_ids(generation.get("begin_suppress_tokens") or [], "begin_suppress_tokens", where) or UNSET,
    )


def _unless(neutral: float, value: float) -> Any:
    return UNSET if value == neutral else value


def _share(value: float, name: str, where: str) -> float:
    if value > 1:
        raise ConfigError(f"{where}: {name} is {quoted(value)}; expected at most 1")
    return value


def _bad_words(generation: Mapping[str, Any], where: str, ends: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Sequences of tokens; an end-of-sequence token alone is no bad word, as in transformers."""
    words = generation.get("bad_words_ids") or []
    if not isinstance(words, list):
        raise ConfigError(f"{where}: bad_words_ids is {quoted(words)}; expected a list of lists of token ids")
    sequences = (_ids(word, "bad_words_ids", where) for word in words)
    return tuple(word for word in sequences if word and word not in ends)


def _ids(value: Any, name: str, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in value
    ):
        raise ConfigError(f"{where}: {name} has {quoted(value)}; expected a list of token ids")
    return tuple(value)


def _unused(where: str, generation: Mapping[str, Any]) -> Iterator[str]:
    settings = {name: value for name, value in sorted(generation.items()) if name not in TAKEN | INERT and value is not None}
    changes = [name for name, value in settings.items() if name not in LENGTHS and value not in (NEUTRAL.get(name), [], {})]
    if changes:
        listing = ", ".join(f"{name} {settings[name]!r:.60}" for name in changes)
        yield f"{where}: not used, so answers may differ from those of transformers: {listing}"
    if lengths := [f"{name} {settings[name]!r:.60}" for name in LENGTHS if name in settings]:
        yield f"{where}: not used, a request says how long its answer may be: {', '.join(lengths)}"
