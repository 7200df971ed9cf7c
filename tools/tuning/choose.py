"""The choice of bucket sizes, context and slots for a workload, costs and limits.

The expected machine time of a request is the sum of what its prefill, its vision runs and its share of the decode steps cost.
The three kinds share nothing but the limits, so each is solved exactly for every number of graphs, and the numbers are then
tried in every combination. How many rows decode steps have depends on everything: they are counted in a replay of the trace
(replay.py), and replay and choice alternate until the choice stays.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...runtime.artifact import GraphKey, Kind
from .batches import batch_frontier, step_cost
from .bucket_sizes import candidate_sizes
from .costs import Costs
from .curves import CostError
from .frontiers import worthwhile
from .limits import BucketChoice, LimitError, Limits, compile_s
from .replay import ReplayStats, Setup, replay
from .search import BestSet, Problem, frontier, make_problem
from .target import Target
from .trace_error import TraceError
from .workload import Workload

ROUNDS = 4
TOLERANCE = 1.01  # a mean time of a request within this factor of the best is as good


@dataclass(slots=True)
class TuningResult:
    """The choice, and the figures for its report. Costs are milliseconds of all requests together."""

    chosen: BucketChoice
    costs: Costs
    workload: Workload
    problems: dict[Kind, Problem]
    frontiers: dict[Kind, list[BestSet]]
    replayed: ReplayStats
    steps: list[Counter[int]]
    slots_tried: dict[int, float] = field(default_factory=dict)  # slots -> mean seconds of a request

    @property
    def variants(self) -> tuple[int, ...]:
        return (0, *self.chosen.images)

    def compile_s(self) -> float:
        """An estimate of the time that compiling takes, on a machine where runs cost what they cost here."""
        return sum(
            compile_s(self.costs, kind, size, images)
            for kind in ("prefill", "decode", "vision")
            for size in self.chosen.of(kind)
            for images in ((0,) if kind == "vision" else self.variants)
        )


def replay_setup(costs: Costs, buckets: Mapping[str, tuple[int, ...]], chosen: BucketChoice, *, chunks: bool = True) -> Setup:
    """The setup of a replay of a choice whose buckets are `buckets`, by kind."""
    variants: list[tuple[Kind, int]] = [(kind, images) for kind in ("prefill", "decode") for images in (0, *chosen.images)]
    times = {
        GraphKey(kind, bucket, images): ms
        for kind, images in [*variants, ("vision", 0)]
        for bucket, ms in costs.table(kind, buckets[kind], images).items()
    }
    if not buckets["vision"]:
        times[GraphKey("vision", 1)] = 1.0  # never run
    return Setup(times, chosen.context, chosen.slots, chunks, costs.past_ms)


def counts_by_variant(image_counts: Mapping[int, Mapping[int, int]], variants: tuple[int, ...]) -> list[Counter[int]]:
    """Counts by images seen as counts by the variant that runs, which is the smallest that sees as many."""
    counts_of = [Counter[int]() for _ in variants]
    for seen, counts in image_counts.items():
        counts_of[next(i for i, variant in enumerate(variants) if variant >= seen)].update(counts)
    return counts_of


def choose(workload: Workload, target: Target, limits: Limits) -> TuningResult:
    """The best choice within the limits; raises LimitError, TraceError or CostError."""
    if not workload.requests:
        most = target.max_positions
        raise TraceError(
            f"all {workload.dropped} requests are longer than the context of {limits.context or most} tokens"
            + ("; give a larger --context" if limits.context and (most is None or limits.context < most) else "")
            + (
                f"; the model has {most} positions, so give shorter requests"
                if most and (limits.context or most) >= most
                else ""
            )
        )
    return _Choice(workload, target, limits).run()


class _Choice:
    def __init__(self, workload: Workload, target: Target, limits: Limits) -> None:
        self.workload, self.target, self.limits = workload, target, limits
        most = max(workload.images)
        self.images: tuple[int, ...] = ((1,) if most == 1 else (1, most)) if target.crossed and most else ()
        self.variants = (0, *self.images)
        self.context = self._context()
        slots = self._slots()
        self.costs = target.costs(self.context, slots[-1])
        if limits.compile_s is not None and "bound" in self.costs.source:
            raise CostError("the time of compiling can only be estimated from measured costs; leave --max-compile-minutes out")
        self.prefill = self._prefill_problem()
        self.vision = self._vision_problem()
        self.frontiers: dict[Kind, list[BestSet]] = {"prefill": frontier(self.prefill, limits.prefill)}
        if self.vision:
            self.frontiers["vision"] = frontier(self.vision, limits.vision)
        self.slots_candidates = slots
        self.replays: dict[BucketChoice, ReplayStats] = {}

    def run(self) -> TuningResult:
        slots, mean_seconds = self._best_slots()
        before = self._provisional(slots)
        replayed, steps, chosen = self._round(self._replay(before), slots)
        for _ in range(ROUNDS):
            if chosen == before:
                break
            before = chosen
            replayed, steps, chosen = self._round(replayed, slots)
        problems: dict[Kind, Problem] = {"prefill": self.prefill, **({"vision": self.vision} if self.vision else {})}
        return TuningResult(chosen, self.costs, self.workload, problems, self.frontiers, replayed, steps, mean_seconds)

    def _round(self, replayed: ReplayStats, slots: int) -> tuple[ReplayStats, list[Counter[int]], BucketChoice]:
        """Choose for the decode steps of a replay, and replay the choice."""
        steps = counts_by_variant(replayed.rows, self.variants)
        tables = [self.costs.table("decode", range(1, slots + 1), images) for images in self.variants]
        self.frontiers["decode"] = batch_frontier(tables, steps, slots, self.limits.decode)
        chosen = self._allocate(slots)
        return self._replay(chosen), steps, chosen

    # ---- the cache

    def _context(self) -> int:
        """The context of the limits, or that of the longest request, rounded up to a multiple of 64."""
        if self.limits.context:
            return self.limits.context
        longest = max(self.workload.totals)
        context = -(-longest // 64) * 64
        return min(context, self.target.max_positions or context)

    def _slots(self) -> list[int]:
        """Numbers of slots that fit in memory, ascending."""
        slots = [self.limits.slots] if self.limits.slots else [1 << i for i in range(self.limits.most_slots.bit_length())]
        images = max(self.images, default=0)
        sizes = {s: self.target.nbytes(self.context, s, self.limits.granularity, images) for s in slots}
        fitting = [s for s in slots if self.limits.memory is None or sizes[s] <= self.limits.memory]
        if not fitting:
            raise LimitError(
                f"{slots[0]} slots of {self.context} tokens and the weights take {sizes[slots[0]] / 1e9:.1f} GB, but "
                f"{(self.limits.memory or 0) / 1e9:.1f} GB are allowed; give a smaller --context, fewer --slots or more memory"
            )
        return fitting

    def _best_slots(self) -> tuple[int, dict[int, float]]:
        """The fewest slots with which a request takes at most TOLERANCE times as long as with the best number."""
        mean_seconds: dict[int, float] = {}
        if len(self.slots_candidates) == 1:
            return self.slots_candidates[0], mean_seconds
        for slots in self.slots_candidates:
            times = self._replay(self._provisional(slots)).total_s
            mean_seconds[slots] = sum(times) / len(times)
        best = min(mean_seconds.values())
        return next(slots for slots, mean in mean_seconds.items() if mean <= TOLERANCE * best), mean_seconds

    def _provisional(self, slots: int) -> BucketChoice:
        """The best buckets of the other kinds, and powers of two for decode."""
        decode = tuple(sorted({1 << i for i in range(slots.bit_length())} | {slots}))
        return BucketChoice(
            prefill=self.frontiers["prefill"][-1].buckets,
            decode=tuple(b for b in decode if b <= slots),
            vision=self._vision_buckets(-1),
            images=self.images,
            context=self.context,
            slots=slots,
        )

    def _replay(self, chosen: BucketChoice) -> ReplayStats:
        if chosen not in self.replays:
            buckets = {"prefill": chosen.prefill, "decode": chosen.decode, "vision": chosen.vision}
            self.replays[chosen] = replay(self.workload.block, replay_setup(self.costs, buckets, chosen))
        return self.replays[chosen]

    # ---- the exact problems

    def _prefill_problem(self) -> Problem:
        limits, lengths = self.limits, counts_by_variant(self.workload.lengths, self.variants)
        every = self.workload.every_length
        sizes = limits.prefill_sizes or candidate_sizes(every, limits.granularity, min(limits.largest, self.context))
        if max(sizes) > self.context:
            raise LimitError(
                f"prefill size {max(sizes)} exceeds the context {self.context}; leave it out"
                + (f" or give --context {max(sizes)}" if max(sizes) <= (self.target.max_positions or max(sizes)) else "")
            )
        tables = [self.costs.table("prefill", sizes, images) for images in self.variants]
        loads = {size: sum(compile_s(self.costs, "prefill", size, images) for images in self.variants) for size in sizes}
        return make_problem(sizes, tables, lengths, loads)

    def _vision_problem(self) -> Problem | None:
        if not self.workload.tiles or self.target.crossed:
            return None
        sizes = candidate_sizes(self.workload.tiles, 1, max(self.workload.tiles))
        return make_problem(sizes, [self.costs.table("vision", sizes)], [self.workload.tiles])

    def _vision_buckets(self, place: int) -> tuple[int, ...]:
        if self.target.tiles and self.workload.tiles:
            return (self.target.tiles,)
        return self.frontiers["vision"][place].buckets if self.vision else ()

    # ---- graphs among the kinds

    def _allocate(self, slots: int) -> BucketChoice:
        """The cheapest combination of the frontiers that keeps the limits; of equals the one with fewest graphs.

        Combinations are taken by what they cost without the limit on compile time, which only raises it; so the search
        ends at the first that cannot be better than the best so far.
        """
        best: tuple[float, int, BucketChoice] | None = None
        for bound, graphs, places in self._combinations():
            if best and bound >= best[0] * (1 - 1e-12):
                break
            if self.limits.graphs is not None and graphs > self.limits.graphs:
                continue
            candidate = self._within_time(places, slots)
            if candidate and (not best or candidate[0] < best[0] * (1 - 1e-12)):
                best = (candidate[0], graphs, candidate[1])
        if not best:
            least = 2 * len(self.variants) + len(self._vision_buckets(0))
            raise LimitError(
                f"no choice keeps the limits; at least {least} graphs are needed, one of each kind and variant: raise "
                "--max-graphs or --max-compile-minutes"
            )
        return best[2]

    def _combinations(self) -> list[tuple[float, int, tuple[int, int, int]]]:
        """(milliseconds of a request, graphs, places in the frontiers of prefill, decode and vision), cheapest first."""
        requests, block = self.workload.requests, len(self.workload.block)
        vision = self.frontiers.get("vision", [BestSet((), 0.0)])
        combinations = []
        frontiers = (
            worthwhile(each, self.limits.least_saving) for each in (self.frontiers["prefill"], self.frontiers["decode"], vision)
        )
        for (i, p), (j, d), (k, v) in itertools.product(*(enumerate(each) for each in frontiers)):
            seen = len(self._vision_buckets(k))
            graphs = seen + len(self.variants) * (len(p.buckets) + len(d.buckets))
            combinations.append(((p.cost + v.cost) / requests + d.cost / block, graphs, (i, j, k)))
        return sorted(combinations)

    def _within_time(self, places: tuple[int, int, int], slots: int) -> tuple[float, BucketChoice] | None:
        """A combination, prefill chosen again where it takes too long to compile; None where nothing is quick enough."""
        (i, j, k), limits = places, self.limits
        prefill, decode, vision = self.frontiers["prefill"][i], self.frontiers["decode"][j], self._vision_buckets(k)
        if limits.compile_s is not None:
            others = sum(compile_s(self.costs, "vision", size, 0) for size in vision)
            others += sum(compile_s(self.costs, "decode", size, n) for size in decode.buckets for n in self.variants)
            loads = dict(zip(self.prefill.candidates, self.prefill.loads, strict=True))
            if sum(loads[b] for b in prefill.buckets) + others > limits.compile_s:
                if others + min(loads.values()) > limits.compile_s:
                    return None
                prefill = frontier(self.prefill, len(prefill.buckets), limits.compile_s - others)[-1]
        seen = self.frontiers["vision"][k].cost if self.vision else 0.0
        cost = (prefill.cost + seen) / self.workload.requests + decode.cost / len(self.workload.block)
        return cost, BucketChoice(prefill.buckets, decode.buckets, vision, self.images, self.context, slots)


def decode_cost(result: TuningResult, buckets: tuple[int, ...]) -> float:
    """Milliseconds of all decode steps of the replay in other buckets."""
    tables = [result.costs.table("decode", buckets, images) for images in result.variants]
    return step_cost(buckets, tables, result.steps)
