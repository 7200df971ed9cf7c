"""Requests in, tokens out: one step runs one graph.

The engine joins the parts and holds no policy of its own: the scheduler decides what runs, the feeds fill the arrays, the
backend computes, NextToken chooses tokens and says where an answer ends.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..artifact import Kind, Manifest
from ..backends.base import Backend, Result
from ..processor.detokenizer import IncrementalDetokenizer
from ..processor.prompt import Prompt
from ..sampling.logits_processors import Constraint, LogitsProcessors, logits_processors_for
from ..sampling.prompt_lookup import PromptLookup
from .access import InterruptedStepError
from .block_budget import block_budget
from .cache_keys import cache_keys_of
from .conversation import Conversation
from .feeds import Feed, Feeds
from .fit import check_blocks, check_draft, check_fit
from .metrics import Metrics
from .next_token import NextToken
from .open_cache import open_cache
from .options import EngineOptions
from .preemption import restored
from .prefix_cache import EncoderCache
from .request import SamplingParams, Sequence, Times, TokenSource
from .scheduler import Costs, Scheduler, Step


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One run of a graph: its feed, and the slot and the image of the cache that it works on (0 where the text is in pages)."""

    step: Step
    feed: Feed
    slot: int
    image: int


class Engine:
    """The graphs of one artifact on one backend, and the requests that they answer.

    For one thread at a time (access.py). An exception leaves it fit for use: the sequences that it concerns end with the
    exception as their `error`, and their slots are cleared; all others go on.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`backend` runs the graphs of the manifest; `clock` gives seconds.

        Raises ValueError for drafts that no graph can verify, ArtifactError for a cache_gb that holds nothing.
        """
        options = options or EngineOptions()
        self.manifest, self.backend, self.options, self.clock = manifest, backend, options, clock
        check_draft(manifest, options.speculate)
        self.metrics = Metrics()
        self.budget = block_budget(manifest, options.cache_gb)
        self.features = EncoderCache(options.feature_bytes)
        opened = open_cache(manifest, backend, self.budget, self.metrics, self.features, reuse=options.reuse)
        self.cache, self.unused = opened.cache, opened.unused
        self.feeds = Feeds(manifest)
        self.graphs = self.feeds.graphs
        self.scheduler = Scheduler(
            self.cache, _costs(manifest), prefill_budget=options.prefill_budget, prefix_cache=opened.prefixes
        )
        self.next_token = NextToken(manifest.model)
        self.on_run: Callable[[GraphRun], object] | None = None  # called before each run of a graph
        self.timed: list[Sequence] = []  # sequences with a deadline
        self.failed: list[Sequence] = []  # sequences that the latest step has ended with an exception
        self.computing = False  # in the backend: a run that an interrupt stops there can be repeated
        self.torn: BaseException | None = None  # what stopped a change in the middle, until `reset` is through
        self._ids = itertools.count()
        self._commits: dict[Kind, Callable[[Step, Result], None]] = {
            "vision": self._commit_vision,
            "prefill": self._commit_prefill,
            "decode": self._commit_decode,
            "verify": self._commit_verify,
        }

    def add_request(self, prompt: Prompt, params: SamplingParams, *, return_logits: bool = False) -> Sequence:
        """Queue a prompt; raises ContextError when it and max_new_tokens do not fit the cache."""
        sequence = self.new_sequence(prompt, params, return_logits=return_logits)
        self.add(sequence)
        return sequence

    def new_sequence(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        return_logits: bool = False,
        index: int = 0,
        constraints: tuple[Constraint, ...] = (),
        token_source: TokenSource | None = None,
    ) -> Sequence:
        """A checked sequence that is not queued yet: answer `index` of params.n. A `token_source` chooses its tokens, in
        place of the sampler; the answer ends as others do."""
        check_fit(self.manifest, prompt, params.max_new_tokens)
        check_blocks(self.budget, prompt, params.max_new_tokens)
        model, cross = self.manifest.model, self.manifest.cache.cross
        return Sequence(
            id=next(self._ids),
            prompt=prompt,
            params=params,
            sampling=params.resolved(model.sampling, index),
            features=self._new_features(prompt),
            cache_keys=cache_keys_of(prompt, model.image.rows, cross=cross is not None),
            cross_tiles=cross.tiles if cross else 0,
            logits_processors=None if token_source else self._logits_processors(prompt, params, constraints),
            prompt_lookup=self._prompt_lookup(prompt, params),
            token_source=token_source,
            keep_logits=return_logits,
            times=Times(arrived=self.clock()),
        )

    def add(self, sequence: Sequence, text: IncrementalDetokenizer | None = None) -> None:
        """Queue a sequence; not one that was cancelled before. `text` takes its tokens and says where a stop string ends it."""
        self._mend()
        sequence.text = text
        if sequence.finish_reason is not None:
            return
        if sequence.params.deadline_s is not None:
            self.timed.append(sequence)
        self.scheduler.add(sequence)

    def expire(self) -> list[Sequence]:
        """End the sequences whose deadlines have passed, and return them."""
        if not self.timed:
            return []
        now, late = self.clock(), []
        for sequence in self.timed:
            if sequence.finish_reason is None and now - sequence.times.arrived >= (sequence.params.deadline_s or 0):
                self._finish(sequence, "deadline")
                late.append(sequence)
        self.timed = [sequence for sequence in self.timed if sequence.finish_reason is None]
        self._release_rows()
        return late

    def step(self) -> Step:
        """Run one graph and hand its result to the sequences that took part.

        Raises the exceptions of the device and of the choice of a token, after the sequences in `failed` have ended with them.
        """
        self._mend()
        self.failed = []
        try:
            step = self._attempt()
        except Exception as error:
            self.reset(error)
            raise
        self._release_rows()
        if self.failed and (error := self.failed[0].error):
            raise error
        assert step is not None, "an attempt gives a step or ends a sequence"
        return step

    def _attempt(self) -> Step | None:
        """One step; sequences that fail are in `failed`. An exception raised here leaves the engine in an undefined state."""
        try:
            step = self.scheduler.next_step()
            self.metrics.preemptions, self.metrics.evicted_blocks = self.scheduler.preemptions, self.cache.blocks.evicted
        except Exception as error:
            sequence, self.scheduler.preparing = self.scheduler.preparing, None
            if sequence is None:
                raise
            self._fail(sequence, error)
            return None
        try:
            feed = self.feeds(step, self.cache)
            # logits [B, V] float32; vision: image rows [tiles, P, C], or already in the cache
            result = self.run_graph(step, feed)
        except Exception as error:
            for sequence in step.sequences:
                self._fail(sequence, error)
            return step
        self._commits[step.kind](step, result)
        return step

    def interrupted(self, error: BaseException) -> None:
        """An exception such as KeyboardInterrupt has ended a call to the engine; it belongs to the thread, not to a request."""
        if self.computing:
            self.computing = False  # nothing has changed but rows of the cache that the next run writes again
        else:
            self.reset(error)

    def reset(self, error: BaseException) -> None:
        """End all sequences with an error and forget the contents of the cache."""
        self.torn = error
        cause = error if isinstance(error, Exception) else InterruptedStepError.by(error)
        for sequence in self.scheduler.sequences():
            if sequence.finish_reason is None:
                self.failed.append(sequence)
                sequence.slot, sequence.error, sequence.times.finished = None, cause, self.clock()
                self.metrics.count_end(sequence, "failed")
                sequence.finish_reason = "failed"
        self.scheduler.clear()
        self.cache.reset()
        self.features.clear()
        self.timed, self.computing, self.torn = [], False, None

    def _mend(self) -> None:
        if self.torn is not None:
            self.reset(self.torn)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence with an error; its slot may contain anything."""
        if sequence.slot is not None:
            self.cache.clear(sequence.slot)
        sequence.error = error
        self._finish(sequence, "failed")
        self.failed.append(sequence)

    def run_graph(self, step: Step, feed: Feed) -> Result:
        """Run the graph of a step, by the clock."""
        slot, image = self._place(step)
        if self.on_run is not None:
            self.on_run(GraphRun(step, feed, slot, image))
        started = self.clock()
        for sequence in step.sequences:
            times = sequence.times
            times.started = times.started or started
        self.computing = True
        result = self.backend.run(self.graphs[step.graph_key], feed, slot, image)
        self.computing = False
        self.metrics.count(step, self.clock() - started)
        return result

    def _place(self, step: Step) -> tuple[int, int]:
        """The slot and the image that a run works on. Decode runs over all slots; image features belong to no slot, nor do
        pages."""
        first, cross = step.sequences[0], self.manifest.cache.cross
        if step.kind == "decode" or (step.kind == "vision" and not cross) or self.manifest.cache.pages:
            return 0, 0
        return first.held_slot, first.tiles_done // step.bucket if step.kind == "vision" else 0

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that has not finished."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")
            self._release_rows()

    def forget(self, sequence: Sequence) -> None:
        """Drop the text of a sequence that has finished."""
        sequence.text = None

    def resume(self, sequence: Sequence, conversation: Conversation) -> None:
        """Let a sequence that is not queued yet be the next turn of a conversation.

        It runs in the conversation's slot, if that is still there when it is queued, and leaves it parked; images that the
        conversation has encoded are not encoded again.
        """
        sequence.conversation = conversation
        sequence.tiles_done = conversation.common_tiles(sequence.cache_keys.images)
        if sequence.tiles_done:
            rows = sequence.tiles_done * self.manifest.model.image.rows
            sequence.features[:rows] = conversation.features[:rows]

    def slot_of(self, conversation: Conversation) -> int | None:
        """The slot that is parked for a conversation; None while a turn runs, where others needed it, and with pages."""
        return self.cache.parked.get(conversation)

    def release(self, conversation: Conversation) -> None:
        """Free the slot that is parked for a conversation, if there is one."""
        if (slot := self.cache.take_back(conversation)) is not None:
            self.cache.release(slot)
            self._release_rows()

    @property
    def capacity(self) -> int:
        """Tokens that one sequence may have: the context, or what the blocks hold."""
        return min(self.manifest.cache.context, self.budget.tokens)

    def _release_rows(self) -> None:
        """Between two steps, with a budget: give back the memory of rows that no slot holds any more."""
        if self.unused is not None and self.unused.pool.shrunk:
            self.unused.release(self.backend.give_back, idle=self.scheduler.idle)

    def _commit_vision(self, step: Step, result: Result) -> None:
        sequence = step.sequences[0]
        start, end = sequence.tiles_done, sequence.tiles_done + step.count
        images = sequence.cache_keys.images
        if sequence.cross_tiles:
            self.cache.images[sequence.held_slot] += (images[start // sequence.cross_tiles],)
        else:
            rows = result.first
            per_tile = rows.shape[1]
            sequence.features[start * per_tile : end * per_tile] = rows[: step.count].reshape(-1, rows.shape[2])
            for tile, digest in enumerate(images[start:end]):
                self.features.put(digest, rows[tile])
        sequence.tiles_done = end
        if not sequence.generated:
            sequence.times.vision_s = self.clock() - sequence.times.started

    def _commit_prefill(self, step: Step, result: Result) -> None:
        sequence = step.sequences[0]
        end = sequence.computed + step.count
        self.cache.extend(sequence.held_slot, sequence.context_keys.keys[sequence.computed : end])
        sequence.computed = end
        if sequence.prefilling:
            return
        if sequence.generated:  # it was preempted: the token that follows is known
            restored(sequence)
        else:
            times = sequence.times
            times.first_token = self.clock()
            times.prefill_s = times.first_token - times.started - times.vision_s
            self._gain(sequence, result, 0)

    def _commit_decode(self, step: Step, result: Result) -> None:
        rows = self.cache.rows_of(step.slots)
        for row, sequence in zip(rows, step.sequences, strict=True):
            self.cache.append(sequence.held_slot, sequence.generated[-1], sequence.cache_keys.answer)
            self._gain(sequence, result, row)

    def _commit_verify(self, step: Step, result: Result) -> None:
        """Tokens are chosen one by one, for as long as the next one is the draft's: that one is in the cache already."""
        sequence, before = step.sequences[0], len(step.sequences[0].generated)
        assert sequence.prompt_lookup is not None, "only a lookup makes drafts"
        for row, guess in enumerate((*step.draft, None)):
            self.cache.append(sequence.held_slot, sequence.generated[-1], sequence.cache_keys.answer)
            self._gain(sequence, result, row)
            if sequence.finish_reason or sequence.generated[-1] != guess:
                break
        tokens = sequence.generated[before:]
        right = sum(token == guess for token, guess in zip(tokens, step.draft, strict=False))
        sequence.prompt_lookup.verified(right, len(step.draft))
        self.metrics.drafted += len(step.draft)
        self.metrics.accepted += right

    def _gain(self, sequence: Sequence, result: Result, row: int) -> None:
        """The next token of a sequence, from one row of logits, and its end if that is the last one."""
        try:
            reason = self.next_token.add(sequence, result, row)
        except Exception as error:  # of its constraints, its text, or its row: no other sequence is concerned
            self._fail(sequence, error)
            return
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.times.finished = self.clock()
        self.metrics.count_end(sequence, reason)
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason  # at last: another thread may wait for it

    def load(self) -> None:
        """Make all graphs ready to run."""
        for graph in self.manifest.graphs:
            self.backend.load(graph)

    def unload(self) -> None:
        """Free what graphs take; a graph that is run again is loaded again."""
        for graph in self.manifest.graphs:
            self.backend.unload(graph)

    def _new_features(self, prompt: Prompt) -> np.ndarray:
        """Room for the features of a prompt's tiles; none with cross-attention, whose keys and values are in the cache."""
        model = self.manifest.model
        rows = 0 if self.manifest.cache.cross else len(prompt.pixels) * model.image.rows
        return np.empty((rows, model.hidden_size), np.float32)

    def _logits_processors(
        self, prompt: Prompt, params: SamplingParams, constraints: tuple[Constraint, ...]
    ) -> LogitsProcessors | None:
        model = self.manifest.model
        ends = {*model.eos_token_ids, *params.stop_token_ids}
        return logits_processors_for(params, prompt, ends, model.vocab_size, constraints, model.sampling)

    def _prompt_lookup(self, prompt: Prompt, params: SamplingParams) -> PromptLookup | None:
        options = self.options
        longest = options.speculate if params.speculate is None else check_draft(self.manifest, params.speculate)
        if not longest:
            return None
        tokens = np.where(prompt.rows < 0, prompt.token_ids, -1)
        return PromptLookup(tokens, self.manifest.model.vocab_size, longest, options.ngrams)


def _costs(manifest: Manifest) -> Costs:
    return {graph.graph_key: graph.cost_ms for graph in manifest.graphs}
