"""Requests in, tokens out: one step runs one graph.

The engine joins the parts and holds no policy of its own: the scheduler decides what runs, the feeds fill the arrays, the
backend computes, the sampler chooses.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np

from ..artifact import Artifact, Kind, Manifest
from ..backends.base import Backend, Result
from ..backends.open import open_backend
from ..processor.prompt import Prompt
from ..sampling.logits_processors import Constraint, logits_processors_for
from ..sampling.prompt_lookup import PromptLookup
from ..sampling.sampler import logprob_of, sample
from .access import InterruptedStepError
from .cache import SlotCache
from .cache_keys import cache_keys_of
from .feeds import Feed, Feeds
from .metrics import Metrics
from .prefix_cache import EncoderCache, SlotPrefixCache
from .request import SamplingParams, Sequence
from .scheduler import Costs, Scheduler, Step

NGRAMS = 2, 4


class ContextError(ValueError):
    """A prompt and its answer do not fit the cache."""


class Engine:
    """Runs the graphs of one artifact on one backend.

    For one thread at a time (access.py). An exception leaves it fit for use: it ends the sequences that it concerns, each with
    the exception as its `error`, and what their slots hold is forgotten; all others go on.
    """

    def __init__(
        self,
        artifact: Artifact,
        backend: Backend | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        prefill_budget: int | None = None,
        reuse: bool = True,
        image_cache_mb: int = 256,
        speculate: int = 0,
        ngrams: tuple[int, int] = NGRAMS,
        verify: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`prefill_budget`: see Scheduler. `reuse`: whether requests take over cache rows and features from each other, of
        features at most `image_cache_mb` megabytes. `speculate`, `ngrams`: tokens of a draft and of what it is found by (see
        Lookup), for requests that do not say. `verify`: whether what this machine has packed of the weights is read and
        checked. `clock`: seconds. Raises ValueError for what the artifact cannot verify."""
        self.manifest: Manifest = artifact.manifest
        self.clock = clock
        self.metrics = Metrics()
        self.cache = SlotCache(self.manifest.cache, keep=reuse)
        self.graphs = {graph.graph_key: graph for graph in self.manifest.graphs}
        self.feeds = Feeds(self.manifest)
        self.backend = backend or open_backend(
            self.manifest.backend,
            artifact.folder,
            self.manifest.cache,
            device=device,
            threads=threads,
            manifest=self.manifest,
            verify=verify,
        )
        self.features = EncoderCache(image_cache_mb << 20 if reuse else 0)
        prefixes = SlotPrefixCache(self.manifest, self.cache, self.backend, self.metrics, self.features) if reuse else None
        self.scheduler = Scheduler(self.cache, self._costs(), prefill_budget=prefill_budget, reuse=prefixes)
        self.speculate, self.ngrams = self._drafted(speculate), _sizes(ngrams)
        # Called whenever a sequence has gained a token; whether a stop string has ended it.
        self.on_token: Callable[[Sequence], bool] | None = None
        self.eos = frozenset(self.manifest.model.eos_token_ids)
        self.timed: list[Sequence] = []  # sequences with a deadline
        self.failed: list[Sequence] = []  # sequences that the latest step has ended with an exception
        self.computing = False  # in the backend: what an interrupt stops there can be run again
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
    ) -> Sequence:
        """A checked sequence that is not queued yet: answer `index` of params.n."""
        self._check_fit(prompt, params.max_new_tokens)
        model, cross = self.manifest.model, self.manifest.cache.cross
        rows = 0 if cross else len(prompt.pixels) * model.image.rows
        return Sequence(
            id=next(self._ids),
            prompt=prompt,
            params=params,
            sampling=params.resolved(model.sampling, index),
            features=np.empty((rows, model.hidden_size), np.float32),
            cache_keys=cache_keys_of(prompt, model.image.rows, cross=cross is not None),
            cross_tiles=cross.tiles if cross else 0,
            logits_processors=logits_processors_for(
                params, prompt, {*self.eos, *params.stop_token_ids}, model.vocab_size, constraints, model.sampling
            ),
            prompt_lookup=self._prompt_lookup(prompt, params),
            keep_logits=return_logits,
            arrived=self.clock(),
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; not one that was cancelled before."""
        self._mend()
        if sequence.finish_reason is not None:
            return
        if sequence.params.deadline_s is not None:
            self.timed.append(sequence)
        self.scheduler.add(sequence)

    def expire(self) -> list[Sequence]:
        """End the sequences whose deadlines have passed; which they are."""
        if not self.timed:
            return []
        now, late = self.clock(), []
        for sequence in self.timed:
            if sequence.finish_reason is None and now - sequence.arrived >= (sequence.params.deadline_s or 0):
                self._finish(sequence, "deadline")
                late.append(sequence)
        self.timed = [sequence for sequence in self.timed if sequence.finish_reason is None]
        return late

    def step(self) -> Step:
        """Run one graph and hand its result to the sequences that took part.

        Raises what the device, or the choice of a token, has raised, after the sequences in `failed` have ended with it.
        """
        self._mend()
        self.failed = []
        try:
            step = self._attempt()
        except Exception as error:
            self.reset(error)
            raise
        if self.failed and (error := self.failed[0].error):
            raise error
        assert step is not None, "an attempt gives a step or ends a sequence"
        return step

    def _attempt(self) -> Step | None:
        """A step; sequences that it fails are in `failed`. What it raises has left nothing that can be relied on."""
        try:
            step = self.scheduler.next_step()
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
        """End all sequences with an error and forget what the cache holds."""
        self.torn = error
        cause = error if isinstance(error, Exception) else InterruptedStepError.by(error)
        for sequence in self.scheduler.sequences():
            if sequence.finish_reason is None:
                self.failed.append(sequence)
                sequence.slot, sequence.error, sequence.finished = None, cause, self.clock()
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
        """End a sequence with an error; its slot may hold anything."""
        if sequence.slot is not None:
            self.cache.clear(sequence.slot)
        sequence.error = error
        self._finish(sequence, "failed")
        self.failed.append(sequence)

    def run_graph(self, step: Step, feed: Feed) -> Result:
        slot, image = self._place(step)
        started = self.clock()
        for sequence in step.sequences:
            sequence.started = sequence.started or started
        self.computing = True
        result = self.backend.run(self.graphs[step.graph_key], feed, slot, image)
        self.computing = False
        self.metrics.count(step, self.clock() - started)
        return result

    def _place(self, step: Step) -> tuple[int, int]:
        """Slot and image that a run works on. Decode runs over all slots; rows of features belong to no slot."""
        first, cross = step.sequences[0], self.manifest.cache.cross
        if step.kind == "decode" or (step.kind == "vision" and not cross):
            return 0, 0
        return first.held_slot, first.tiles_done // step.bucket if step.kind == "vision" else 0

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence that has not finished."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

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
        sequence.vision_s = self.clock() - sequence.started

    def _commit_prefill(self, step: Step, result: Result) -> None:
        sequence = step.sequences[0]
        end = sequence.computed + step.count
        self.cache.extend(sequence.held_slot, sequence.cache_keys.keys[sequence.computed : end])
        sequence.computed = end
        if not sequence.prefilling:
            sequence.first_token = self.clock()
            sequence.prefill_s = sequence.first_token - sequence.started - sequence.vision_s
            self._gain(sequence, result, 0)

    def _commit_decode(self, step: Step, result: Result) -> None:
        for sequence in step.sequences:
            slot = sequence.held_slot
            self.cache.append(slot, sequence.generated[-1], sequence.cache_keys.answer)
            self._gain(sequence, result, slot)

    def _commit_verify(self, step: Step, result: Result) -> None:
        """Tokens are chosen one by one as ever, for as long as the next one was drafted: it is in the cache already."""
        sequence, before = step.sequences[0], len(step.sequences[0].generated)
        assert sequence.prompt_lookup is not None, "only a lookup makes drafts"
        for row, drafted in enumerate((*step.draft, None)):
            self.cache.append(sequence.held_slot, sequence.generated[-1], sequence.cache_keys.answer)
            self._gain(sequence, result, row)
            if sequence.finish_reason or sequence.generated[-1] != drafted:
                break
        gained = sequence.generated[before:]
        right = sum(token == drafted for token, drafted in zip(gained, step.draft, strict=False))
        sequence.prompt_lookup.verified(right, len(step.draft))
        self.metrics.drafted += len(step.draft)
        self.metrics.accepted += right

    def _gain(self, sequence: Sequence, result: Result, row: int) -> None:
        """The next token of a sequence, from one row of logits, and its end if that is the last one."""
        try:
            reason = self._choose(sequence, result, row)
        except Exception as error:  # of its rules, its text, or its row: no other sequence is concerned
            self._fail(sequence, error)
            return
        if reason is not None:
            self._finish(sequence, reason)

    def _choose(self, sequence: Sequence, result: Result, row: int) -> str | None:
        """Add the next token to a sequence; why it ends there, if it does."""
        params, logits_processors = sequence.params, sequence.logits_processors
        token = self._from_candidates(sequence, result, row)
        if token is None:
            token = self._of_whole_row(sequence, result.row(row))
        if token is None:
            return "dead_end"
        sequence.generated.append(token)
        if logits_processors:
            logits_processors.accept(token)
        stopped = self.on_token is not None and self.on_token(sequence)
        if (
            (token in self.eos and not params.ignore_eos)
            or token in params.stop_token_ids
            or (logits_processors and logits_processors.done)
        ):
            return "stop"
        if stopped:
            return "stop"
        return "length" if len(sequence.generated) == params.max_new_tokens else None

    def _from_candidates(self, sequence: Sequence, result: Result, row: int) -> int | None:
        """The token, where the graph's candidates decide it and nothing else is wanted of the row."""
        if not result.candidates or sequence.logits_processors or sequence.keep_logits or sequence.params.logprobs is not None:
            return None
        model, position = self.manifest.model, len(sequence.generated)
        return result.candidates.choose(row, sequence.sampling, position, used=model.tokenizer.used, vocab=model.vocab_size)

    def _of_whole_row(self, sequence: Sequence, logits: np.ndarray) -> int | None:
        """The token, and whatever else is wanted of its row; None where no token may follow."""
        logits_processors, logprobs = sequence.logits_processors, sequence.params.logprobs
        row = logits_processors.applied(logits) if logits_processors else logits
        if logits_processors and row.max() == -np.inf:
            return None
        if sequence.keep_logits:
            sequence.logits.append(logits.copy())
        token = sample(row, sequence.sampling, len(sequence.generated), self.manifest.model.tokenizer.used)
        if logprobs is not None:
            sequence.logprobs.append(logprob_of(logits, token, logprobs))
        return token

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finished = self.clock()
        self.metrics.count_end(sequence, reason)
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason  # at last: another thread may wait for it

    def stop(self, sequence: Sequence) -> None:
        """End a sequence because its text holds a stop string."""
        if sequence.finish_reason in (None, "length"):
            if sequence.finish_reason is None:
                self._finish(sequence, "stop")
            else:
                self.metrics.finished.update({"length": -1, "stop": 1})
            sequence.finish_reason = "stop"

    def load(self) -> None:
        """Make all graphs ready to run."""
        for graph in self.manifest.graphs:
            self.backend.load(graph)

    def unload(self) -> None:
        """Free what graphs take; a graph that is run again is loaded again."""
        for graph in self.manifest.graphs:
            self.backend.unload(graph)

    def _check_fit(self, prompt: Prompt, max_new_tokens: int) -> None:
        cross = self.manifest.cache.cross
        if cross and len(prompt.frames) > cross.images:
            raise ContextError(
                f"the prompt has {len(prompt.frames)} images, but the artifact holds {cross.images} for each sequence; give "
                f"fewer, or compile a larger one: {self.manifest.recompilation(images=len(prompt.frames))}"
            )
        context = self.manifest.cache.context
        needed = prompt.length + max_new_tokens
        if needed > context:
            raise ContextError(
                f"the prompt has {prompt.text_tokens} text tokens and {prompt.image_tokens} image tokens, and max_new_tokens "
                f"is {max_new_tokens}: {needed} in all, but the artifact holds {context}; "
                + self._fitting(prompt.length, needed)
            )

    def _fitting(self, prompt: int, needed: int) -> str:
        """What can be done about a prompt of so many tokens that needs a larger context than there is."""
        model, context = self.manifest.model, self.manifest.cache.context
        less = f"give at most {context - prompt} new tokens" if prompt < context else "give a shorter prompt"
        if model.can_hold(needed):
            return f"{less}, or compile a larger one: {self.manifest.recompilation(context=needed)}"
        most = model.max_positions
        assert isinstance(most, int)
        if context < most and prompt < most:
            larger = self.manifest.recompilation(context=most)
            return f"{less}, or compile all {most} positions of the model, for at most {most - prompt} new tokens: {larger}"
        return f"{less}: the model has {most} positions"

    def _drafted(self, wanted: int) -> int:
        """So many tokens of a draft, if a graph can verify them."""
        most = max(self.manifest.buckets("verify"), default=1) - 1
        if not 0 <= wanted <= most:
            possible = 0 < wanted < self.manifest.cache.context  # a draft and the token before it have to fit
            more = f", or compile one for more: {self.manifest.recompilation(speculate=wanted)}" if possible else ""
            raise ValueError(
                f"speculate is {wanted}, but the artifact verifies at most {most} drafted tokens; give 0 to {most}{more}"
            )
        return wanted

    def _prompt_lookup(self, prompt: Prompt, params: SamplingParams) -> PromptLookup | None:
        longest = self.speculate if params.speculate is None else self._drafted(params.speculate)
        if not longest:
            return None
        tokens = np.where(prompt.rows < 0, prompt.token_ids, -1)
        return PromptLookup(tokens, self.manifest.model.vocab_size, longest, self.ngrams)

    def _costs(self) -> Costs:
        return {graph.graph_key: graph.cost_ms for graph in self.manifest.graphs}


def _sizes(ngrams: tuple[int, int]) -> tuple[int, int]:
    least, most = ngrams
    if not 1 <= least <= most:
        raise ValueError(
            f"ngrams is {ngrams}; expected the fewest and the most tokens that a draft is found by, such as {NGRAMS}"
        )
    return least, most
