"""The bucket sizes of the least expected cost of covering lengths: exact, by branch and bound.

A length n is covered as the runtime does it (runtime/engine/chunks.py): by the buckets whose costs add up to least. Under a
set B

    V(0) = 0,   V(n) = min over b in B of cost(b) + V(max(0, n - b)),

and the search is for the B of at most K candidates that makes the sum of weight(n) * V(n) least.

Why the answer is the optimum. A further bucket never raises any V(n), so the sum for a set of buckets is at least that for
every larger set. Sets are built from the smallest bucket upwards. All buckets that are still added to a prefix whose largest
bucket is p are above p, so no completion can be better than the prefix with every candidate above p. A prefix is dropped only
when this bound is not below the best complete set known. All others are completed.

Several streams (variants of a graph with costs of their own) may share one set of buckets: V has a row for each.

Legend: G candidates, S streams, N the longest length, R sets; V of several sets is float64 [N + 1, S, R]. Lengths and buckets
are in units, the greatest common divisor of the candidates, which is exact because only sums of buckets are compared with a
length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_BATCH = 512  # prefixes that are completed together, so that the interpreter's part stays small
_EXACT = 1e-12  # relative: below this, a difference of two sums is rounding


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A problem: lengths to cover, and candidates of buckets that cover them.

    `costs`, float64 [G, S], are positive; `weights`, float64 [S, N + 1], say how often each length in units occurs (length 0
    costs nothing); `loads`, float64 [G], are what a candidate takes of a limit that a set must keep.
    """

    candidates: tuple[int, ...]
    unit: int
    costs: np.ndarray
    weights: np.ndarray
    loads: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        """The candidates in units."""
        return tuple(candidate // self.unit for candidate in self.candidates)


@dataclass(frozen=True, slots=True)
class BestSet:
    """The best set of at most a given number of buckets."""

    buckets: tuple[int, ...]
    cost: float  # summed over all lengths
    explored: int = 0  # sets whose cost was computed


def make_problem(
    candidates: Sequence[int],
    costs: Sequence[Mapping[int, float]],
    lengths: Sequence[Mapping[int, float]],
    loads: Mapping[int, float] | None = None,
) -> Problem:
    """`costs` and `lengths` (how often each occurs) have one mapping for each stream."""
    ordered = tuple(sorted(set(candidates)))
    if not ordered or ordered[0] < 1:
        raise ValueError(f"the candidates are {list(ordered)}; expected at least one, and positive sizes")
    unit = math.gcd(*ordered)
    longest = max((n for stream in lengths for n in stream), default=0)
    weights = np.zeros((len(lengths), -(-longest // unit) + 1))
    for stream, length_counts in enumerate(lengths):
        for n, count in length_counts.items():
            weights[stream, -(-n // unit)] += count
    weights[:, 0] = 0.0
    table = np.array([[stream[b] for stream in costs] for b in ordered], dtype=float)
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError("the cost of a candidate is not a positive number; correct the table of costs")
    return Problem(ordered, unit, table, weights, np.array([loads[b] if loads else 0.0 for b in ordered]))


def set_cost(problem: Problem, buckets: Sequence[int]) -> float:
    """The sum of weight(n) * V(n) under these buckets, at least one and all of them candidates."""
    place = {candidate: i for i, candidate in enumerate(problem.candidates)}
    return _evaluate(problem, tuple(place[b] for b in buckets))


def frontier(problem: Problem, most: int, limit: float = math.inf) -> list[BestSet]:
    """The best sets of at most 1, 2, ... `most` buckets whose loads sum to at most `limit`.

    Raises ValueError where not even one candidate keeps the limit.
    """
    results: list[BestSet] = []
    for count in range(1, min(most, len(problem.candidates)) + 1):
        results.append(_Search(problem, count, limit).run(results[-1] if results else None))
    return results


def _empty(problem: Problem) -> np.ndarray:
    """V of the empty set, which covers length 0 alone."""
    streams, lengths = problem.weights.shape
    values = np.full((lengths, streams, 1), math.inf)
    values[0] = 0.0
    return values


def _extend(values: np.ndarray, size: int, cost: np.ndarray) -> np.ndarray:
    """V of sets -> V of the same sets with a bucket of `size` units and `cost` [S] added."""
    values = np.ascontiguousarray(values)
    out, end, step = np.empty(values.shape), len(values), cost[:, None]
    out[0] = 0.0
    np.minimum(values[1 : size + 1], step, out=out[1 : size + 1])
    for start in range(size + 1, end, size):
        block = out[start : start + size]
        np.add(out[start - size : start - size + len(block)], step, out=block)
        np.minimum(block, values[start : start + size], out=block)
    return out


def _sums(problem: Problem, values: np.ndarray) -> np.ndarray:
    """The weighted sum of V for each set, float64 [R]."""
    return problem.weights.T.ravel() @ values.reshape(-1, values.shape[-1])


def _evaluate(problem: Problem, members: Sequence[int]) -> float:
    values, sizes = _empty(problem), problem.sizes
    for i in members:
        values = _extend(values, sizes[i], problem.costs[i])
    return float(_sums(problem, values)[0])


@dataclass(slots=True)
class _OpenPrefix:
    """A prefix that lacks two buckets: its places, V [N + 1, S, 1], and a bound for each next place (infinite: none)."""

    prefix: tuple[int, ...]
    values: np.ndarray
    bounds: np.ndarray


@dataclass(slots=True)
class _Search:
    """Sets of exactly `count` candidates, by their places in ascending order."""

    problem: Problem
    count: int
    limit: float
    best: float = math.inf
    members: tuple[int, ...] = ()
    explored: int = 0
    _waiting: list[_OpenPrefix] = field(default_factory=list)

    def run(self, smaller: BestSet | None) -> BestSet:
        """Raises ValueError where no set keeps the limit."""
        problem = self.problem
        if smaller:
            self._start(tuple(problem.candidates.index(b) for b in smaller.buckets), smaller.cost)
        if self.count == 1:
            self._try_sets([(i,) for i in range(len(problem.candidates))])
        else:
            tables = [_empty(problem)]
            for i in reversed(range(len(problem.candidates))):
                tables.append(_extend(tables[-1], problem.sizes[i], problem.costs[i]))
            self._visit((), 0, np.concatenate(tables[::-1], axis=-1), self.limit)
            self._complete()
        if not self.members:
            raise ValueError(f"no single candidate keeps the limit of {self.limit:g}; allow more")
        return BestSet(tuple(problem.candidates[i] for i in self.members), self.best, self.explored)

    def _visit(self, prefix: tuple[int, ...], start: int, tables: np.ndarray, left: float) -> None:
        """Complete `prefix`. Set i of tables: the prefix and all candidates from start + i on; the last: the prefix."""
        problem, missing = self.problem, self.count - len(prefix)
        end = len(problem.candidates) - missing + 1
        bounds: np.ndarray = np.full(len(problem.candidates), math.inf)
        bounds[start:end] = _sums(problem, tables[..., : end - start])
        bounds[problem.loads > left] = math.inf
        if missing == 2:
            self._waiting.append(_OpenPrefix(prefix, tables[..., -1:].copy(), bounds))
            if len(self._waiting) == _BATCH:
                self._complete()
            return
        for place in np.argsort(bounds, kind="stable").tolist():
            if self._cannot_improve(float(bounds[place])):
                break
            further = _extend(tables[..., place - start + 1 :], problem.sizes[place], problem.costs[place])
            self._visit((*prefix, place), place + 1, further, left - float(problem.loads[place]))

    def _complete(self) -> None:
        """Try the last two buckets on all waiting prefixes."""
        problem, waiting = self.problem, self._waiting
        if not waiting:
            return
        values = np.concatenate([each.values for each in waiting], axis=-1)
        bounds = np.array([each.bounds for each in waiting])
        left = np.array([self.limit - sum(problem.loads[i] for i in each.prefix) for each in waiting])
        for place, size in enumerate(problem.sizes):
            rows = np.flatnonzero([not self._cannot_improve(bound) for bound in bounds[:, place]])
            if rows.size:
                partial = _extend(values[..., rows], size, problem.costs[place])
                self._last([(*waiting[row].prefix, place) for row in rows], partial, left[rows] - problem.loads[place])
        waiting.clear()

    def _last(self, prefixes: list[tuple[int, ...]], values: np.ndarray, left: np.ndarray) -> None:
        """Try every last bucket on sets that end with the same one."""
        problem = self.problem
        for place in range(prefixes[0][-1] + 1, len(problem.candidates)):
            sums = _sums(problem, _extend(values, problem.sizes[place], problem.costs[place]))
            self.explored += len(prefixes)
            sums[problem.loads[place] > left] = math.inf
            row = int(sums.argmin())
            if not self._cannot_improve(sums[row]):
                self.best, self.members = float(sums[row]), (*prefixes[row], place)

    def _cannot_improve(self, bound: float) -> bool:
        return bound >= self.best * (1 - _EXACT) if math.isfinite(self.best) else bound == math.inf

    def _start(self, members: tuple[int, ...], cost: float) -> None:
        """A good set to begin with: the best smaller one with its best addition, members swapped while that helps."""
        self.best, self.members = cost, members
        if len(members) < self.count - 1:
            return
        every = range(len(self.problem.candidates))
        trials = [tuple(sorted((*members, i))) for i in every if i not in members]
        while improved := self._try_sets(trials):
            trials = [
                tuple(sorted((*(j for j in improved if j != out), i))) for out in improved for i in every if i not in improved
            ]

    def _try_sets(self, trials: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        before = self.best
        for trial in trials:
            if sum(self.problem.loads[i] for i in trial) <= self.limit:
                cost = _evaluate(self.problem, trial)
                self.explored += 1
                if not self._cannot_improve(cost):
                    self.best, self.members = cost, trial
        return self.members if self.best < before else None
