"""What is asked of the engine, what it keeps about it while it runs, and what comes back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from ..processor.boxes import Box
from ..processor.prompt import Prompt
from ..sampling.logits_processors import LogitsProcessors
from ..sampling.params import ResolvedSampling, SamplingParams
from ..sampling.prompt_lookup import PromptLookup
from ..sampling.sampler import TokenLogprob
from .cache_keys import NO_KEYS, CacheKeys


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
    finish_reason: str  # stop | length | deadline | dead_end (all that could follow is forbidden) | cancelled
    boxes: list[Box]
    prompt_tokens: int  # text tokens and image tokens
    image_tokens: int
    timings: Timings
    logits: np.ndarray | None = None  # float32 [generated, V]; row 0 comes from the prefill
    logprobs: list[TokenLogprob] | None = None  # of each token, where they were asked for
    reused_tokens: int = 0  # positions of the prompt that were in the cache already
    others: tuple[Output, ...] = ()  # of n answers those behind this one


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: owned by the engine, changed by its steps only."""

    id: int
    prompt: Prompt
    params: SamplingParams
    sampling: ResolvedSampling
    features: np.ndarray  # [tiles * P, C] float32, filled by vision steps
    cache_keys: CacheKeys = NO_KEYS
    cross_tiles: int = 0  # tiles of one image, where images enter by cross-attention
    logits_processors: LogitsProcessors | None = None
    prompt_lookup: PromptLookup | None = None  # drafts its answer, where that was asked for
    due: int = 0  # its place among those that wait
    prepared: bool = False  # what can be taken over from others is
    reused: int = 0  # tokens of the prompt that were in the cache already
    reused_tiles: int = 0
    tiles_done: int = 0
    slot: int | None = None
    holder: object | None = None  # for whom its slot is parked when it ends: a chat
    computed: int = 0  # tokens of the prompt in the cache
    generated: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # as in Output, or "failed"; the last of its fields to change
    error: Exception | None = None  # what ended it, where it failed
    keep_logits: bool = False
    logits: list[np.ndarray] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def held_slot(self) -> int:
        """Its slot; raises RuntimeError where it holds none, which no step may meet."""
        if self.slot is None:
            raise RuntimeError(f"request {self.id} holds no slot of the cache; load the artifact again")
        return self.slot

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt.length

    @property
    def images(self) -> int:
        """Images that the sequence's tokens see by cross-attention; 0 where images enter otherwise."""
        return len(self.prompt.frames) if self.prompt.cross_attention else 0

    @property
    def encoding(self) -> bool:
        return self.tiles_done < len(self.prompt.pixels)

    def timings(self) -> Timings:
        """What did not happen, because the sequence ended before, took until then or no time at all."""
        later = max(len(self.generated) - 1, 1)
        first_token = self.first_token or self.finished
        return Timings(
            queue_s=(self.started or self.finished) - self.arrived,
            vision_s=self.vision_s,
            prefill_s=self.prefill_s,
            first_token_s=first_token - self.arrived,
            per_token_s=(self.finished - first_token) / later,
            total_s=self.finished - self.arrived,
        )
