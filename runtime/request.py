"""What is asked of the engine, what it keeps about it while it runs, and what comes back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np

from .artifact import SamplingDefaults
from .boxes import Box
from .prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Left at None, a setting is taken from the checkpoint's generation_config.json.

    temperature 0 is greedy. top_k 0 means no limit. `seed` None draws a fresh one for each request. `stop` may be one text.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) for text in stop):
            raise ValueError(f"stop is {stop}; expected text or a sequence of texts")
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Integral):
                raise ValueError(f"{name} is {value!r}; expected an integer")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; expected 0 (no limit) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; expected 0 to 2**64 - 1")

    def resolved(self, defaults: SamplingDefaults) -> ResolvedSampling:
        """Every choice made: what is left open here is filled from the checkpoint."""
        temperature = self.temperature
        if temperature is None:
            # Naming top_k, top_p or a seed asks for sampling.
            asked = self.top_k is not None or self.top_p is not None or self.seed is not None
            temperature = defaults.temperature if defaults.do_sample or asked else 0.0
        return ResolvedSampling(
            temperature=temperature,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            seed=int(np.random.SeedSequence().entropy) % 2**63 if self.seed is None else self.seed,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """SamplingParams with nothing left open."""

    temperature: float
    top_k: int
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds. `first_token_s` counts from the request's arrival; `per_token_s` is the mean of the later tokens."""

    queue_s: float
    vision_s: float
    prefill_s: float
    first_token_s: float
    per_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The answer to one prompt."""

    text: str
    token_ids: list[int]  # as generated, an end-of-sequence token included
    finish_reason: str  # stop | length
    boxes: list[Box]
    prompt_tokens: int  # text tokens and image tokens
    image_tokens: int
    timings: Timings
    logits: np.ndarray | None = None  # float32 [generated, V]; row 0 comes from the prefill


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: owned by the engine, changed by its steps only."""

    id: int
    prompt: Prompt
    params: SamplingParams
    sampling: ResolvedSampling
    features: np.ndarray  # [tiles * P, C] float32, filled by vision steps
    tiles_done: int = 0
    slot: int | None = None
    keep_slot: bool = False  # a chat holds its slot between turns
    computed: int = 0  # tokens of the prompt in the cache
    generated: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    keep_logits: bool = False
    logits: list[np.ndarray] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt.length

    @property
    def images(self) -> int:
        """Pictures that the sequence's tokens see by cross-attention; 0 where pictures enter otherwise."""
        return len(self.prompt.frames) if self.prompt.sight else 0

    @property
    def encoding(self) -> bool:
        return self.tiles_done < len(self.prompt.pixels)

    def timings(self) -> Timings:
        later = max(len(self.generated) - 1, 1)
        return Timings(
            queue_s=self.started - self.arrived,
            vision_s=self.vision_s,
            prefill_s=self.prefill_s,
            first_token_s=self.first_token - self.arrived,
            per_token_s=(self.finished - self.first_token) / later,
            total_s=self.finished - self.arrived,
        )
