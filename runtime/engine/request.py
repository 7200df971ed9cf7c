"""Requests: the input of the engine, its state while it runs, and its output."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..processor.boxes import Box
from ..processor.detokenizer import IncrementalDetokenizer
from ..processor.prompt import Prompt
from ..sampling.logits_processors import LogitsProcessors
from ..sampling.params import SETTINGS, ResolvedSampling, SamplingParams
from ..sampling.prompt_lookup import PromptLookup
from ..sampling.sampler import TokenLogprob
from ..shown import shown
from .cache_keys import NO_KEYS, CacheKeys

if TYPE_CHECKING:
    from .conversation import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Times of a request in seconds. `first_token_s` counts from its arrival; `per_token_s` is the mean of the later tokens."""

    queue_s: float
    vision_s: float
    prefill_s: float
    first_token_s: float
    per_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The answer to one prompt."""

    text: str  # without special tokens, and without the stop string that ended it
    token_ids: list[int]  # as generated, an end-of-sequence token included
    finish_reason: str  # stop | length | deadline | dead_end (all that could follow is forbidden) | cancelled
    boxes: list[Box]  # in pixels of the images, in the order of the text
    prompt_tokens: int  # text tokens and image tokens
    image_tokens: int
    timings: Timings
    logits: np.ndarray | None = None  # float32 [generated, V]; row 0 comes from the prefill
    logprobs: list[TokenLogprob] | None = None  # of each token, where the request has `logprobs`
    reused_tokens: int = 0  # positions of the prompt that were in the cache already
    others: tuple[Output, ...] = ()  # with n answers, those after this one


@dataclass(slots=True, kw_only=True)
class Times:
    """The course of a request by the engine's clock, in seconds. What has not happened yet is 0."""

    arrived: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    vision_s: float = 0.0  # from the start until the last image was encoded
    prefill_s: float = 0.0  # from then until the first token

    def timings(self, tokens: int) -> Timings:
        """The timings of an answer of so many tokens.

        What did not happen, because the request ended before, took until then or no time at all.
        """
        first_token = self.first_token or self.finished
        return Timings(
            queue_s=(self.started or self.finished) - self.arrived,
            vision_s=self.vision_s,
            prefill_s=self.prefill_s,
            first_token_s=first_token - self.arrived,
            per_token_s=(self.finished - first_token) / max(tokens - 1, 1),
            total_s=self.finished - self.arrived,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and its state. Only the parts of the engine write it, between and in steps; all other code reads it."""

    # the request
    id: int
    prompt: Prompt
    params: SamplingParams
    sampling: ResolvedSampling
    features: np.ndarray  # [tiles * P, C] float32, filled by vision steps
    cache_keys: CacheKeys = NO_KEYS
    cross_tiles: int = 0  # tiles of one image, where images enter by cross-attention
    keep_logits: bool = False
    logits_processors: LogitsProcessors | None = None
    prompt_lookup: PromptLookup | None = None  # drafts its answer; None: no drafts
    token_source: TokenSource | None = None  # chooses its tokens in place of the sampler
    text: IncrementalDetokenizer | None = None  # of its answer, from when it is queued until it is forgotten
    conversation: Conversation | None = None  # for which its slot is parked when it ends

    # how far its prompt is
    due: int = 0  # its place among those that wait
    arrival: int = 0  # and among those of one place, as a count of arrivals
    slot: int | None = None
    room: int = 0  # tokens that the blocks of its slot hold
    preemptions: int = 0  # how often it has lost its slot
    prompt_length: int = field(init=False)
    context: Prompt = field(init=False)  # what runs before it answers: the prompt, or the answer so far as well
    context_keys: CacheKeys = field(init=False)
    context_length: int = field(init=False)
    prepared: bool = False  # the prefix cache and the encoder cache were used
    reused: int = 0  # tokens of the prompt that were in the cache already
    reused_tiles: int = 0
    tiles_done: int = 0
    computed: int = 0  # tokens of the prompt in the cache

    # its answer, and how that ended
    generated: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    error: Exception | None = None  # what ended it, where it failed
    finish_reason: str | None = None  # as in Output, or "failed"; the last of its fields to change

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt.length
        self.set_context(self.prompt, self.cache_keys)

    def set_context(self, context: Prompt, keys: CacheKeys) -> None:
        """Let this run before it answers: a prompt and its keys."""
        self.context, self.context_keys, self.context_length = context, keys, context.length

    @property
    def held_slot(self) -> int:
        """Its slot; raises RuntimeError where it holds none, which no step may meet."""
        if self.slot is None:
            raise RuntimeError(f"request {self.id} holds no slot of the cache; load the artifact again")
        return self.slot

    @property
    def prefilling(self) -> bool:
        return self.computed < self.context_length

    @property
    def tokens(self) -> int:
        """Tokens of its prompt and of its answer so far; all but the last one of the answer are to be in the cache."""
        return self.prompt_length + len(self.generated)

    @property
    def most_rows(self) -> int:
        """Rows of the cache that its longest possible answer takes: its last token needs none."""
        return self.prompt_length + self.params.max_new_tokens - 1

    @property
    def images(self) -> int:
        """Images that the sequence's tokens see by cross-attention; 0 where images enter otherwise."""
        return len(self.prompt.frames) if self.prompt.cross_attention else 0

    @property
    def encoding(self) -> bool:
        return self.tiles_done < len(self.prompt.pixels)

    def timings(self) -> Timings:
        return self.times.timings(len(self.generated))


TokenSource = Callable[[Sequence], int]  # a sequence -> the token after those generated so far


def merge_params(sampling: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    """`sampling` with the settings given by name; an unknown one is an error."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"unknown settings {shown(', '.join(unknown))}; expected {', '.join(sorted(SETTINGS))}")
    return dataclasses.replace(sampling or SamplingParams(), **settings)


def one_answer(params: SamplingParams) -> SamplingParams:
    """The params of an answer that is streamed or kept in a conversation; raises ValueError for several answers."""
    if params.n > 1:
        raise ValueError(f"n is {params.n}; a stream or a chat's turn has one answer, so use generate for several")
    return params


def grouped(outputs: list[Output], n: int) -> list[Output]:
    """The answers to each prompt as one: the first, which has the others."""
    groups = (outputs[start : start + n] for start in range(0, len(outputs), n))
    return [dataclasses.replace(first, others=tuple(others)) for first, *others in groups]
