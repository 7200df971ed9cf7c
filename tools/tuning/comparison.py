"""The comparison of the choice with buckets that are powers of two, and the saving of each bucket.

Padding is the share of all tokens computed that belong to no prompt. Costs are milliseconds of the prefill of a request.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...runtime.engine.chunks import ChunkPlanner
from .bucket_sizes import powers_of_two
from .choose import TuningResult, counts_by_variant, decode_cost, replay_setup
from .replay import ReplayStats, SingleRunPlanner, replay
from .search import Problem, frontier, make_problem, set_cost


@dataclass(frozen=True, slots=True)
class Coverage:
    """The coverage of the prompts of a workload by buckets."""

    name: str
    buckets: tuple[int, ...]
    ms: float  # of a request
    padding: float
    runs: float  # of a request
    by_bucket: Mapping[int, int]  # runs of each bucket, all requests together


def cover(
    name: str,
    costs: Sequence[Mapping[int, float]],
    lengths: Sequence[Mapping[int, int]],
    *,
    chunks: bool = True,
    past_ms: float = 0.0,
) -> Coverage:
    """The coverage of all prompts in the chunks of the runtime's planner, or in one run; a table of costs for each variant.

    Later chunks attend to earlier ones, which costs `past_ms` (costs.py) for every token computed and every token before.
    """
    real = computed = 0
    total_ms, runs = 0.0, Counter[int]()
    for table, length_counts in zip(costs, lengths, strict=True):
        planner = ChunkPlanner(table)
        for length, count in length_counts.items():
            split = planner.split(length) if chunks else [SingleRunPlanner(table).next_bucket(length, 0)]
            pairs = sum(bucket * past for bucket, past in zip(split, itertools.accumulate(split, initial=0), strict=False))
            total_ms += count * (sum(table[bucket] for bucket in split) + past_ms * pairs)
            computed += count * sum(split)
            real += count * length
            for bucket in split:
                runs[bucket] += count
    requests = sum(sum(length_counts.values()) for length_counts in lengths)
    buckets = tuple(sorted(costs[0]))
    return Coverage(name, buckets, total_ms / requests, 1 - real / computed, sum(runs.values()) / requests, runs)


def coverages(result: TuningResult, granularity: int) -> list[Coverage]:
    """Coverages of the choice and of powers of two: in one run each, in chunks, and in chunks with as many graphs as the
    choice."""
    lengths = counts_by_variant(result.workload.lengths, result.variants)
    powers = powers_of_two(granularity, max(result.workload.every_length))

    def tables(buckets: Sequence[int]) -> list[dict[int, float]]:
        return [result.costs.table("prefill", buckets, images) for images in result.variants]

    few = [b for b in powers if b <= result.problems["prefill"].candidates[-1]] or powers[:1]
    best = frontier(make_problem(few, tables(few), lengths), len(result.chosen.prefill))[-1].buckets
    past_ms = result.costs.past_ms
    return [
        cover("chosen", tables(result.chosen.prefill), lengths, past_ms=past_ms),
        cover("powers of two, one run for each prompt", tables(powers), lengths, chunks=False, past_ms=past_ms),
        cover("powers of two, in chunks", tables(powers), lengths, past_ms=past_ms),
        cover(f"the best {len(best)} of them, in chunks: {', '.join(map(str, best))}", tables(best), lengths, past_ms=past_ms),
    ]


def replay_powers_of_two(result: TuningResult, granularity: int) -> ReplayStats:
    """The replay with powers of two everywhere and every prompt in one run; images too."""
    chosen, workload = result.chosen, result.workload
    decode = tuple(sorted({1 << i for i in range(chosen.slots.bit_length())} | {chosen.slots}))
    buckets = {
        "prefill": tuple(powers_of_two(granularity, max(workload.every_length))),
        "decode": tuple(b for b in decode if b <= chosen.slots),
        "vision": chosen.vision and tuple(powers_of_two(1, max(workload.tiles)))
        if "vision" in result.problems
        else chosen.vision,
    }
    return replay(workload.block, replay_setup(result.costs, buckets, chosen, chunks=False))


@dataclass(frozen=True, slots=True)
class BucketReason:
    """The reason for a bucket: the cost that a request would have more without it. None: it cannot be left out."""

    kind: str
    bucket: int
    saves_ms: float | None
    share: float  # of the runs of its kind


def reasons(result: TuningResult) -> list[BucketReason]:
    """The reason for every bucket of the choice."""
    chosen, requests = result.chosen, result.workload.requests
    bucket_reasons: list[BucketReason] = []
    for kind in ("prefill", "vision"):
        if problem := result.problems.get(kind):
            bucket_reasons += _removals(kind, problem, chosen.of(kind), requests, _runs(result, kind))
    if chosen.vision and "vision" not in result.problems:
        bucket_reasons += [BucketReason("vision", bucket, None, 1.0) for bucket in chosen.vision]
    block = len(result.workload.block)
    rows = sum(result.steps, Counter())
    now = decode_cost(result, chosen.decode)
    for bucket, below in zip(chosen.decode, (0, *chosen.decode), strict=False):
        others = tuple(b for b in chosen.decode if b != bucket)
        used = sum(count for row, count in rows.items() if below < row <= bucket) / max(1, sum(rows.values()))
        saves = None if bucket == chosen.slots else (decode_cost(result, others) - now) / block
        bucket_reasons.append(BucketReason("decode", bucket, saves, used))
    return bucket_reasons


def _removals(
    kind: str, problem: Problem, buckets: tuple[int, ...], requests: int, runs: Mapping[int, int]
) -> list[BucketReason]:
    now, total = set_cost(problem, buckets), max(1, sum(runs.values()))
    return [
        BucketReason(
            kind,
            bucket,
            (set_cost(problem, [b for b in buckets if b != bucket]) - now) / requests if len(buckets) > 1 else None,
            runs.get(bucket, 0) / total,
        )
        for bucket in buckets
    ]


def _runs(result: TuningResult, kind: str) -> Mapping[int, int]:
    if kind == "vision":
        return cover("", [result.costs.table("vision", result.chosen.vision)], [result.workload.tiles]).by_bucket
    lengths = counts_by_variant(result.workload.lengths, result.variants)
    tables = [result.costs.table("prefill", result.chosen.prefill, images) for images in result.variants]
    return cover("", tables, lengths).by_bucket
