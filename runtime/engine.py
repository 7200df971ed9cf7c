"""Requests in, tokens out: one step runs one graph.

The engine joins the parts and holds no policy of its own: the scheduler decides what runs, the feeds fill the arrays, the
backend computes, the sampler chooses.
"""

from __future__ import annotations

import itertools
import time

import numpy as np

from .artifact import KINDS, Artifact, Kind, Manifest
from .backends.base import Backend, open_backend
from .cache import SlotCache
from .feeds import Feed, Feeds
from .prompt import Prompt
from .request import SamplingParams, Sequence
from .sampler import sample
from .scheduler import Costs, Scheduler, Step


class ContextError(ValueError):
    """A prompt and its answer do not fit the cache."""


class Metrics:
    """What the engine counted: runs, seconds inside the backend, and sizes real and padded, by graph kind."""

    def __init__(self) -> None:
        self.runs = dict.fromkeys(KINDS, 0)
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.real = dict.fromkeys(KINDS, 0)
        self.padded = dict.fromkeys(KINDS, 0)

    def count(self, step: Step, seconds: float) -> None:
        self.runs[step.kind] += 1
        self.seconds[step.kind] += seconds
        self.real[step.kind] += len(step.sequences) if step.kind == "decode" else step.count
        self.padded[step.kind] += step.bucket


class Engine:
    """Runs the graphs of one artifact on one backend."""

    def __init__(
        self, artifact: Artifact, backend: Backend | None = None, *, device: str = "cpu", threads: int | None = None
    ) -> None:
        self.manifest: Manifest = artifact.manifest
        self.cache = SlotCache(self.manifest.cache)
        self.graphs = {(graph.kind, graph.bucket, graph.images): graph for graph in self.manifest.graphs}
        self.scheduler = Scheduler(self.cache, self._costs())
        self.feeds = Feeds(self.manifest)
        self.backend = backend or open_backend(
            self.manifest.backend, artifact.folder, self.manifest.cache, device=device, threads=threads, manifest=self.manifest
        )
        self.metrics = Metrics()
        self.eos = frozenset(self.manifest.model.eos_token_ids)
        self._ids = itertools.count()
        self._commits = {"vision": self._commit_vision, "prefill": self._commit_prefill, "decode": self._commit_decode}

    def add_request(self, prompt: Prompt, params: SamplingParams, *, return_logits: bool = False) -> Sequence:
        """Queue a prompt; raises ContextError when it and max_new_tokens do not fit the cache."""
        sequence = self.new_sequence(prompt, params, return_logits=return_logits)
        self.scheduler.add(sequence)
        return sequence

    def new_sequence(self, prompt: Prompt, params: SamplingParams, *, return_logits: bool = False) -> Sequence:
        """A checked sequence that is not queued yet."""
        self._check_fit(prompt, params.max_new_tokens)
        image, width = self.manifest.model.image, self.manifest.model.hidden_size
        rows = 0 if self.manifest.cache.cross else len(prompt.pixels) * image.rows
        return Sequence(
            id=next(self._ids),
            prompt=prompt,
            params=params,
            sampling=params.resolved(self.manifest.model.sampling),
            features=np.empty((rows, width), np.float32),
            keep_logits=return_logits,
        )

    def step(self) -> Step:
        """Run one graph and hand its result to the sequences that took part."""
        step = self.scheduler.next_step()
        feed = self.feeds(step, self.cache)
        result = self.run_graph(step, feed)  # logits [B, V] float32; vision: image rows [tiles, P, C], or already in the cache
        self._commits[step.kind](step, result)
        return step

    def run_graph(self, step: Step, feed: Feed) -> np.ndarray:
        slot, image = self._place(step)
        started = time.perf_counter()
        for sequence in step.sequences:
            sequence.started = sequence.started or started
        result = self.backend.run(self.graphs[step.kind, step.bucket, step.images], feed, slot, image)
        self.metrics.count(step, time.perf_counter() - started)
        return result

    def _place(self, step: Step) -> tuple[int, int]:
        """Slot and picture that a run works on. Decode runs over all slots; rows of features belong to no slot."""
        first, cross = step.sequences[0], self.manifest.cache.cross
        if step.kind == "decode" or (step.kind == "vision" and not cross):
            return 0, 0
        assert first.slot is not None
        return first.slot, first.tiles_done // step.bucket if step.kind == "vision" else 0

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence that has not finished."""
        if sequence.finish_reason is None:
            self._finish(sequence, "cancelled")

    def _commit_vision(self, step: Step, rows: np.ndarray) -> None:
        sequence = step.sequences[0]
        if not self.manifest.cache.cross:
            per_tile = rows.shape[1]
            start = sequence.tiles_done * per_tile
            sequence.features[start : start + step.count * per_tile] = rows[: step.count].reshape(-1, rows.shape[2])
        sequence.tiles_done += step.count
        sequence.vision_s = time.perf_counter() - sequence.started

    def _commit_prefill(self, step: Step, logits: np.ndarray) -> None:
        sequence = step.sequences[0]
        sequence.computed += step.count
        self.cache.lengths[sequence.slot] = sequence.computed
        if not sequence.prefilling:
            sequence.first_token = time.perf_counter()
            sequence.prefill_s = sequence.first_token - sequence.started - sequence.vision_s
            self._choose(sequence, logits[0])

    def _commit_decode(self, step: Step, logits: np.ndarray) -> None:
        for sequence in step.sequences:
            self.cache.lengths[sequence.slot] += 1
            self._choose(sequence, logits[sequence.slot])

    def _choose(self, sequence: Sequence, logits: np.ndarray) -> None:
        if sequence.keep_logits:
            sequence.logits.append(logits.copy())
        token = sample(logits, sequence.sampling, len(sequence.generated), self.manifest.model.tokenizer.used)
        sequence.generated.append(token)
        if token in self.eos and not sequence.params.ignore_eos:
            self._finish(sequence, "stop")
        elif len(sequence.generated) == sequence.params.max_new_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        sequence.finish_reason = reason
        sequence.finished = time.perf_counter()
        self.scheduler.finish(sequence)

    def stop(self, sequence: Sequence) -> None:
        """End a sequence because its text holds a stop string."""
        if sequence.finish_reason in (None, "length"):
            if sequence.finish_reason is None:
                self._finish(sequence, "stop")
            sequence.finish_reason = "stop"

    def unload(self) -> None:
        """Free what graphs take; a graph that is run again is loaded again."""
        for graph in self.manifest.graphs:
            self.backend.unload(graph)

    def _check_fit(self, prompt: Prompt, max_new_tokens: int) -> None:
        cross = self.manifest.cache.cross
        if cross and len(prompt.frames) > cross.images:
            raise ContextError(
                f"the prompt has {len(prompt.frames)} pictures, but the artifact holds {cross.images} for each sequence; give "
                f"fewer, or compile a larger one: {self.manifest.recompilation(images=len(prompt.frames))}"
            )
        context = self.manifest.cache.context
        needed = prompt.length + max_new_tokens
        if needed > context:
            raise ContextError(
                f"the prompt has {prompt.text_tokens} text tokens and {prompt.image_tokens} image tokens, and max_new_tokens "
                f"is {max_new_tokens}: {needed} in all, but the artifact holds {context}; ask for less, or compile a larger "
                f"one: {self.manifest.recompilation(context=needed)}"
            )

    def _costs(self) -> Costs:
        costs: dict[tuple[Kind, int], dict[int, float]] = {}
        for graph in self.manifest.graphs:
            costs.setdefault((graph.kind, graph.images), {})[graph.bucket] = graph.cost_ms
        return costs
