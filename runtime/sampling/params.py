"""Sampling parameters of a request: how tokens are chosen and when an answer ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..artifact import SamplingDefaults
from ..shown import quoted, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request. A setting that is None is taken from the checkpoint's generation_config.json.

    temperature 0 is greedy. top_k 0 means no limit. min_p leaves out tokens whose probability is below that share of the
    largest; 0 leaves out none.
    `seed` None draws a fresh one for each request; `n` answers to one prompt draw independently of each other.

    repetition_penalty divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer (Keskar et
    al. 2019); 1 changes nothing. frequency_penalty is subtracted as often as a token is in the answer, presence_penalty once.
    logit_bias is added by token id.

    An answer ends before a text of `stop` (one text or several), at a token of `stop_token_ids`, after max_new_tokens, or
    `deadline_s` seconds after the request; none of the first two before min_new_tokens. No text of bad_words is in it.
    At most one of `json_schema`, `regex` and `choice` constrains the whole answer.

    logprobs k: with the logarithm of each token's probability, before anything above, and with the top k tokens.
    priority: requests of a higher one are admitted earlier, see Scheduler.add.

    speculate k: draft up to k tokens from earlier text and verify them in one run, where that is worth it (prompt_lookup.py);
    the answer is the same. None: as the model was loaded.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    deadline_s: float | None = None
    priority: int = 0
    speculate: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "choice"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, least in _INTEGERS.items():
            _check_integer(name, getattr(self, name), least)
        for token in (*self.stop_token_ids, *self.logit_bias):
            _check_integer("a token id of stop_token_ids or logit_bias", token, 0)
        for name, (usable, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and usable(value)):
                raise ValueError(f"{name} is {shown(value)}; expected {expected}")
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, Real) or not math.isfinite(bias):
                raise ValueError(f"the logit_bias of token {token} is {bias}; expected a finite number")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2**64 - 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; expected at most max_new_tokens, which is {self.max_new_tokens}"
            )
        if "" in self.bad_words:
            raise ValueError("bad_words holds an empty text; expected texts of at least one character")
        self._check_constraint()

    def _check_constraint(self) -> None:
        names = [name for name in ("json_schema", "regex", "choice") if getattr(self, name) not in (None, ())]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} were given; expected one of them at most")
        if names and self.ignore_eos:
            raise ValueError(f"{names[0]} was given with ignore_eos; a constrained answer ends by itself")
        if "" in self.choice:
            raise ValueError("choice holds an empty text; expected texts of at least one character")

    @property
    def constrained(self) -> bool:
        """Whether the answer has to match a JSON schema, a regular expression, or one of several texts."""
        return self.json_schema is not None or self.regex is not None or bool(self.choice)

    def penalty(self, defaults: SamplingDefaults) -> float:
        """The repetition penalty; the checkpoint's where it is None."""
        return (defaults.repetition_penalty or 1.0) if self.repetition_penalty is None else self.repetition_penalty

    def resolved(self, defaults: SamplingDefaults, index: int = 0) -> ResolvedSampling:
        """All settings for answer `index` of n; those that are None are taken from the checkpoint."""
        temperature = self.temperature
        if temperature is None:
            # Any of top_k, top_p, min_p, seed or several answers turns sampling on.
            wants_sampling = (
                any(value is not None for value in (self.top_k, self.top_p, self.seed)) or self.n > 1 or bool(self.min_p)
            )
            temperature = defaults.temperature if defaults.do_sample or wants_sampling else 0.0
        return ResolvedSampling(
            temperature=temperature,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=(defaults.min_p or 0.0) if self.min_p is None else self.min_p,
            seed=int(np.random.SeedSequence().entropy) % 2**63 if self.seed is None else self.seed,  # type: ignore[arg-type]
            index=index,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """SamplingParams for one answer, with every setting filled in."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    min_p: float = 0.0
    index: int = 0  # of n answers


SETTINGS = tuple(each.name for each in fields(SamplingParams))

_INTEGERS = {
    "max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "seed": None, "n": 1, "logprobs": 0, "priority": None,
    "speculate": 0,
}  # fmt: skip  # name -> least value
_WORDS = {"top_k": "0 (no limit) or more"}
_NUMBERS = {
    "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or more"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number above 0; 1 changes nothing"),
    "presence_penalty": (math.isfinite, "a finite number"),
    "frequency_penalty": (math.isfinite, "a finite number"),
    "deadline_s": (lambda x: 0 < x < math.inf, "a number of seconds above 0"),
}


def _check_integer(name: str, value: Any, least: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, Integral):
        raise ValueError(f"{name} is {quoted(value)}; expected an integer")
    if least is not None and value < least:  # type: ignore[operator]
        raise ValueError(f"{name} is {value}; expected {_WORDS.get(name, f'at least {least}')}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {shown(texts)}; expected text or a sequence of texts")
    return texts
