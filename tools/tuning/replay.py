"""A replay of requests through the runtime's own scheduler, with the time of each step from a table of costs.

Only the clock is simulated: what runs next, which bucket it takes and who waits for a slot are decided by
runtime/engine/scheduler.py. A decode step that would be repeated unchanged is counted as often as it repeats: until a
sequence ends, or until a request arrives for which a slot is free. With a budget of blocks (runtime/engine/blocks.py) it is
counted until a sequence needs another block.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...runtime.artifact import CacheSpec, CrossSpec, GraphKey, Kind
from ...runtime.engine.cache import SlotCache
from ...runtime.engine.chunks import ChunkPlanner
from ...runtime.engine.preemption import restored
from ...runtime.engine.request import Sequence as Running
from ...runtime.engine.request import Times
from ...runtime.engine.scheduler import Scheduler, Step
from ...runtime.processor.images import Frame
from ...runtime.processor.prompt import CrossAttentionMask, Prompt
from ...runtime.sampling.params import ResolvedSampling, SamplingParams
from .workload import Arrival

_SAMPLING = ResolvedSampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)

REPLAYED_KINDS: tuple[Kind, ...] = ("vision", "prefill", "decode")  # no verify: drafts need texts, which a trace lacks


class SingleRunPlanner(ChunkPlanner):
    """A planner without chunks: every length in one run of the smallest bucket that holds it."""

    def next_bucket(self, length: int, room: int) -> int:
        return next(bucket for bucket in self.costs if bucket >= length)


@dataclass(slots=True)
class ReplayStats:
    """The figures of a replay: seconds of every request, and the work of each kind of graph."""

    first_token_s: list[float] = field(default_factory=list)
    per_token_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    busy_s: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(REPLAYED_KINDS, 0.0))
    real: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(REPLAYED_KINDS, 0))
    padded: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(REPLAYED_KINDS, 0))
    rows: dict[int, Counter[int]] = field(default_factory=dict)  # images seen -> rows that a decode step reached -> steps
    span_s: float = 0.0  # from the first arrival to the last token
    running_s: float = 0.0  # the sum of all steps' seconds, each as often as sequences held a slot
    most_running: int = 0
    preemptions: int = 0

    @property
    def load(self) -> float:
        """The share of the time in which something ran."""
        return sum(self.busy_s.values()) / self.span_s if self.span_s else 0.0

    def padding(self, kind: Kind) -> float:
        """The share of padding in the sizes that a kind computed."""
        return 1 - self.real[kind] / self.padded[kind] if self.padded[kind] else 0.0


@dataclass(frozen=True, slots=True)
class Setup:
    """The setup of a replay: milliseconds of a run of each graph, and the cache."""

    costs: Mapping[GraphKey, float]
    context: int
    slots: int
    chunks: bool = True  # False: every prompt in one run
    past_ms: float = 0.0  # as in costs.py; a decode step takes it for the tokens that are there, not for its padding
    read_ms: float | None = None  # the same of a decode step, where it differs from that of chunks
    blocks: int | None = None  # of all slots together; None: every slot may hold the whole context


def replay(arrivals: Sequence[Arrival], setup: Setup) -> ReplayStats:
    """The figures of requests in the order of their times, all of which must be known."""
    return _Replay(arrivals, setup).run()


class _Replay:
    def __init__(self, arrivals: Sequence[Arrival], setup: Setup) -> None:
        self.setup, self.arrivals = setup, arrivals
        smallest = min(key.bucket for key in setup.costs if key.kind == "prefill")
        seen = max(key.images for key in setup.costs)
        cross = CrossSpec(layers=1, images=seen, rows=1, tiles=1) if seen else None
        spec = CacheSpec(
            layers=1,
            kv_heads=1,
            head_dim=1,
            slots=setup.slots,
            context=setup.context,
            rows=setup.context + smallest,
            dtype="float32",
            cross=cross,
        )
        self.cache = SlotCache(spec, budget=setup.blocks)
        self.scheduler = Scheduler(self.cache, setup.costs)
        if not setup.chunks:
            planners = self.scheduler.prefill
            planners.update({images: SingleRunPlanner(planner.costs) for images, planner in planners.items()})
        self.remaining: dict[int, int] = {}  # id -> tokens still to be generated
        self.stats, self.now, self.next = ReplayStats(), 0.0, 0
        self.arrived: deque[Running] = deque()  # and not yet in the scheduler
        self.answers = [arrival.generated for arrival in arrivals]

    def run(self) -> ReplayStats:
        start = self.now = self.arrivals[0].time or 0.0
        while self.next < len(self.arrivals) or self.arrived or not self.scheduler.idle:
            self._arrive()
            if self.scheduler.idle:
                self.now = self._next_time()
                continue
            step = self.scheduler.next_step()
            first, more = self._seconds(step)
            times = self._repeats(step, first, more) if step.kind == "decode" else 1
            elapsed = times * first + more * times * (times - 1) / 2
            self.now += elapsed
            self._count(step, times, elapsed)
            self._commit(step, times)
        self.stats.span_s, self.stats.preemptions = self.now - start, self.scheduler.preemptions
        return self.stats

    def _next_time(self) -> float:
        return (self.arrivals[self.next].time or 0.0) if self.next < len(self.arrivals) else math.inf

    def _arrive(self) -> None:
        """Add requests that have arrived to the scheduler, no more of them than slots are free: others would only wait
        there."""
        while self._next_time() <= self.now:
            self.arrived.append(self._sequence(self.next))
            self.next += 1
        while self.arrived and len(self.scheduler.waiting) < self.cache.free:
            self.scheduler.add(self.arrived.popleft())

    def _sequence(self, place: int) -> Running:
        arrival = self.arrivals[place]
        ids = np.broadcast_to(np.int32(0), (arrival.prompt,))  # sizes without memory
        frame = Frame(left=0, top=0, width=1, height=1, image_width=1, image_height=1)
        cross_attention = (
            CrossAttentionMask(visible=np.empty((0, 0), bool), gates=np.empty((0, 2), np.float32)) if arrival.images else None
        )
        prompt = Prompt(
            token_ids=ids,
            rows=ids,
            pixels=np.broadcast_to(np.uint8(0), (arrival.tiles, 1, 1, 3)),
            frames=(frame,) * arrival.images,
            image_tokens=0,
            cross_attention=cross_attention,
            state=ids,
        )
        self.remaining[place] = arrival.generated
        return Running(
            id=place,
            prompt=prompt,
            params=SamplingParams(max_new_tokens=arrival.generated),
            sampling=_SAMPLING,
            features=np.empty((0, 0), np.float32),
            times=Times(arrived=arrival.time or 0.0, started=-math.inf),
        )

    def _seconds(self, step: Step) -> tuple[float, float]:
        """Seconds of a step, and how many more each repetition takes than the one before, since caches grow."""
        past_s, cost = self.setup.past_ms / 1e3, self.setup.costs[step.graph_key] / 1e3
        if step.kind == "prefill":
            return cost + past_s * step.bucket * step.sequences[0].computed, 0.0
        if self.setup.read_ms is not None:
            past_s = self.setup.read_ms / 1e3
        if step.kind == "vision" or not past_s:
            return cost, 0.0
        cached_tokens = sum(s.prompt.length + self.answers[s.id] - self.remaining[s.id] for s in step.sequences)
        return cost + past_s * cached_tokens, past_s * len(step.sequences)

    def _repeats(self, step: Step, first: float, more: float) -> int:
        """The number of unchanged repetitions of a decode step."""
        if len(step.sequences) < len(self.scheduler.running):  # others run between
            return 1
        shortest = min(self.remaining[sequence.id] for sequence in step.sequences)
        if self.cache.bounded:
            shortest = min(shortest, *(1 + sequence.room - sequence.tokens for sequence in step.sequences))
        if not self.cache.free or self._next_time() == math.inf:
            return shortest
        gap = self._next_time() - self.now
        # The least n with n * first + more * n * (n - 1) / 2 >= gap.
        half = first - more / 2
        times = max(1, math.floor((math.sqrt(half * half + 2 * more * gap) - half) / more if more else gap / first))
        if times * first + more * times * (times - 1) / 2 < gap:  # the root is rounded: one that ends with the gap is enough
            times += 1
        return min(shortest, times)

    def _count(self, step: Step, times: int, elapsed: float) -> None:
        stats, kind = self.stats, step.kind
        stats.busy_s[kind] += elapsed
        stats.real[kind] += times * (len(step.sequences) if kind == "decode" else step.count)
        stats.padded[kind] += times * step.bucket
        running = len(self.scheduler.running)
        stats.running_s, stats.most_running = stats.running_s + elapsed * running, max(stats.most_running, running)
        if kind == "decode":
            stats.rows.setdefault(max(s.images for s in step.sequences), Counter())[step.count] += times
        for sequence in step.sequences:
            course = sequence.times
            if course.started == -math.inf:
                course.started = self.now - elapsed
                stats.queue_s.append(course.started - course.arrived)

    def _commit(self, step: Step, times: int) -> None:
        if step.kind == "vision":
            step.sequences[0].tiles_done += step.count
            return
        if step.kind == "prefill":
            sequence = step.sequences[0]
            sequence.computed += step.count
            if sequence.prefilling:
                return
            if sequence.generated:  # it was preempted: the token that follows is known
                restored(sequence)
                return
            sequence.times.first_token = self.now
            self._generate(sequence, 1)
            return
        for sequence in step.sequences:
            self._generate(sequence, times)

    def _generate(self, sequence: Running, tokens: int) -> None:
        sequence.generated += [0] * tokens
        self.remaining[sequence.id] -= tokens
        if self.remaining[sequence.id]:
            return
        self.scheduler.finish(sequence)
        del self.remaining[sequence.id]
        stats, answer, times = self.stats, self.answers[sequence.id], sequence.times
        stats.first_token_s.append(times.first_token - times.arrived)
        stats.total_s.append(self.now - times.arrived)
        if answer > 1:
            stats.per_token_s.append((self.now - times.first_token) / (answer - 1))
