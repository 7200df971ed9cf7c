"""Certificates: each compiled graph against its eager definition, at the edges of its bucket.

Silent errors that appear only at certain lengths are the best-known failure of systems with fixed shapes. So each graph
runs at length = bucket, bucket - 1, previous bucket + 1 and 1, into an empty cache and behind earlier tokens up to the
cache's end; the cache holds large garbage wherever no token is, as it does in use. Compared are the first output and
every cache row that the step must have written, and rows that it must not touch have to be unchanged. Vision graphs run
with every number of tiles that they serve, and all they write into the cache is compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..runtime.artifact import CROSS_HIDDEN, Certificate, CertificateCase, GraphSpec, ModelFacts, TensorSpec
from ..runtime.backends.base import Backend, cache_name
from ..runtime.feeds import Feed, new_feed
from ..runtime.rope import query_scales, rope_tables

TOLERANCE = 1e-4  # largest absolute difference over the largest magnitude
# Rounded activations: a result further from the truth than zero is would be worth nothing. How much rounding costs a model
# is a question for its task, not for a certificate: layers of random weights amplify it without measure.
ROUNDING_TOLERANCE = 1.0
GARBAGE = 30.0
NOISE = 65521  # a prime, so that repeated noise does not line up with heads and rows


class CertificateError(RuntimeError):
    """A compiled graph does not compute what its definition says."""


@dataclass(frozen=True, slots=True)
class Case:
    """One feed. `past` and `count` [B]: tokens in each row's cache before the step, and real new ones."""

    name: str
    past: np.ndarray
    count: np.ndarray


class Certifier:
    """Checks graphs of one artifact under construction against the eager definitions."""

    def __init__(self, reference: Backend, candidate: Backend, facts: ModelFacts, *, vocab: int, seed: int = 0) -> None:
        """`vocab`: rows of the embedding table."""
        self.reference, self.candidate = reference, candidate
        self.facts, self.vocab, self.seed = facts, vocab, seed
        self.noise = np.random.default_rng(seed).standard_normal(NOISE, np.float32)

    def certify(self, graph: GraphSpec, previous: int, twin: GraphSpec | None = None) -> tuple[Certificate, float]:
        """The certificate of one graph and the milliseconds of one run; `previous` is the next smaller bucket, or 0.

        A graph whose kernels round activations comes with its exact `twin`.

        Raises CertificateError naming the graph, the case and the error when the tolerance is broken.
        """
        checked = twin or graph
        find = vision_cases if graph.kind == "vision" else text_cases
        run = self._vision if graph.kind == "vision" else self._text
        rng = np.random.default_rng(self.seed)
        cases = []
        for case in find(graph, previous):
            error = run(checked, case, rng)
            cases.append(CertificateCase(name=case.name, error=error))
            _require(graph, case.name, error, TOLERANCE)
        self.candidate.unload(checked)
        # The last case is the fullest: every row or the whole bucket, behind as many tokens as fit.
        rounding = None if twin is None else self._rounding(graph, list(find(graph, previous))[-1], rng)
        cost = self._cost(graph)
        for each in (self.reference, self.candidate):
            each.unload(graph)
        return Certificate(reference="eager torch float32", tolerance=TOLERANCE, cases=tuple(cases), rounding=rounding), cost

    def _vision(self, graph: GraphSpec, case: Case, rng: np.random.Generator) -> float:
        feed = new_feed(graph)
        tiles = int(case.count[0])
        feed["pixels"][:tiles] = rng.integers(0, 256, feed["pixels"][:tiles].shape)
        if "tile_count" in feed:
            # Garbage in unused tiles must not matter.
            feed["pixels"][tiles:] = rng.integers(0, 256, feed["pixels"][tiles:].shape)
            feed["tile_count"][0] = tiles
            feed["aspect_id"][0] = 1 + max(i for i, grid in enumerate(self.facts.image.grids) if grid[0] * grid[1] == tiles)
        expected = self.reference.run(graph, feed)[:tiles]
        error = relative_error(self.candidate.run(graph, feed)[:tiles], expected)
        for name in filter(None, (cache_name(spec.name, 0) for spec in graph.outputs)):
            error = max(error, relative_error(*(each.read_cache(name, 1) for each in (self.candidate, self.reference))))
        return error

    def _text(self, graph: GraphSpec, case: Case, rng: np.random.Generator) -> float:
        feed = self._text_feed(graph, case, rng)
        starts = self._fill_caches(graph, case, rng)
        expected = self.reference.run(graph, feed).copy()
        active = case.count > 0
        error = relative_error(self.candidate.run(graph, feed)[active], expected[active])
        for spec in graph.inputs:
            if "_cache." in spec.name:
                error = max(error, self._cache_error(spec.name, case, self._past(spec, case, starts[spec.name])))
        return error

    def _rounding(self, graph: GraphSpec, case: Case, rng: np.random.Generator) -> float:
        """How far rounded activations carry the first output from the reference, in one case."""
        feed = self._text_feed(graph, case, rng)
        self._fill_caches(graph, case, rng)
        expected = self.reference.run(graph, feed).copy()
        distance = np.linalg.norm(self.candidate.run(graph, feed) - expected) / np.linalg.norm(expected)
        _require(graph, f"{case.name} with activations rounded, in length", float(distance), ROUNDING_TOLERANCE)
        return float(distance)

    def _cache_error(self, name: str, case: Case, old: np.ndarray) -> float:
        """Rows just written, against the reference; infinite where an earlier row was touched."""
        expected, got = (each.read_cache(name, len(old)) for each in (self.reference, self.candidate))
        error = 0.0
        for b, (past, count) in enumerate(zip(case.past, case.count, strict=True)):
            if not np.array_equal(got[b, :, :past], old[b, :, :past]):
                return float("inf")
            if count:
                written = np.s_[b, :, past : past + count]
                error = max(error, relative_error(got[written], expected[written]))
        return error

    def _fill_caches(self, graph: GraphSpec, case: Case, rng: np.random.Generator) -> dict[str, int]:
        """Random keys and values where tokens are, large garbage elsewhere; the same in both backends.

        The result says where in the noise each buffer starts: a third copy of a long cache could take all that is left.
        """
        starts = {}
        for spec in graph.inputs:
            start = starts[spec.name] = int(rng.integers(NOISE))
            if spec.name.startswith(("cross_k.", "cross_v.")):
                self._fill(spec.name, self._noise(spec.shape, start))
            elif "_cache." in spec.name:
                self._fill(spec.name, self._past(spec, case, start))
        return starts

    def _past(self, spec: TensorSpec, case: Case, start: int) -> np.ndarray:
        """What a cache buffer holds before the step."""
        value = self._noise(spec.shape, start)
        for b, past in enumerate(case.past):
            value[b, :, past:] *= GARBAGE
        return value

    def _noise(self, shape: tuple[int, ...], start: int) -> np.ndarray:
        """The same noise from another start: drawing afresh for every layer would take longer than the checks."""
        return np.resize(np.roll(self.noise, -start), shape)

    def _fill(self, name: str, value: np.ndarray) -> None:
        self.reference.write_cache(name, value)
        self.candidate.write_cache(name, value)

    def _text_feed(self, graph: GraphSpec, case: Case, rng: np.random.Generator) -> Feed:
        feed = new_feed(graph)
        b, t = feed["token_ids"].shape
        feed["token_ids"][...] = rng.integers(0, self.vocab, (b, t))
        feed["lengths"][...] = case.past
        positions = case.past[:, None] + np.arange(t)
        rope, rows = self.facts.rope, int(positions.max()) + 1
        tables = rope_tables(rope, feed["rope_cos"].shape[-1], rows)
        feed["rope_cos"][...], feed["rope_sin"][...] = (table[positions] for table in tables)
        if "query_scale" in feed:
            feed["query_scale"][..., 0] = query_scales(rope, rows)[positions]
        if "cross_mask" in feed:
            self._look(feed, rng)
        count = int(case.count[0])
        if graph.kind == "prefill":
            feed["last_index"][0] = count - 1
            feed["token_ids"][0, count:] = 0
        if "row_index" in feed:
            feed["image_rows"][...] = rng.standard_normal(feed["image_rows"].shape, np.float32)
            from_picture = rng.random(t) < 0.5
            feed["row_index"][0] = np.where(from_picture, rng.permutation(t), -1)
            feed["row_index"][0, count:] = -1
        return feed

    @staticmethod
    def _look(feed: Feed, rng: np.random.Generator) -> None:
        """Every token sees tiles of its own choice, or, every third of them, none; the gates are on, half on and off."""
        visible = rng.random(feed["cross_mask"].shape) < 0.5
        visible &= rng.random((*visible.shape[:2], 1)) < 2 / 3
        feed["cross_mask"][...] = np.where(visible, 0, CROSS_HIDDEN)
        some = visible.any(-1)
        feed["cross_gate"][..., 0] = some | (rng.random(some.shape) < 0.5)
        feed["cross_gate"][..., 1] = some

    def _cost(self, graph: GraphSpec) -> float:
        """Milliseconds of one run: the best of a few, since what else the machine does only ever adds."""
        feed = new_feed(graph)
        seconds: list[float] = []
        while len(seconds) < 5 and sum(seconds) < 1.0:
            started = time.perf_counter()
            self.candidate.run(graph, feed)
            seconds.append(time.perf_counter() - started)
        return round(min(seconds) * 1e3, 4)


def _require(graph: GraphSpec, case: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise CertificateError(
            f"{graph.name} differs from its definition by a relative {error:.2e} at {case} (allowed: {allowed:.0e}); "
            "this build must not be used, please report it"
        )


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference divided by the largest magnitude of `expected`; infinite where a value is not finite."""
    if not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def vision_cases(graph: GraphSpec, previous: int) -> Iterator[Case]:
    """Each tile count that the bucket serves."""
    for tiles in range(previous + 1, graph.bucket + 1):
        yield Case(f"tiles {tiles}", np.zeros(1, np.int32), np.array([tiles], np.int32))


def text_cases(graph: GraphSpec, previous: int) -> Iterator[Case]:
    """Edge lengths of a prefill bucket, or edge batch sizes of a decode bucket, with short, middle and full caches."""
    rows = next(spec.shape[2] for spec in graph.inputs if "_cache." in spec.name)
    if graph.kind == "prefill":
        t = graph.bucket
        for count in sorted({t, t - 1, min(previous + 1, t), 1} - {0}):
            yield Case(f"length {count}, past 0", np.zeros(1, np.int32), np.array([count], np.int32))
        for past in sorted({min(1, rows - t), (rows - t) // 2, rows - t} - {0}):
            for count in sorted({t, min(previous + 1, t)}):
                yield Case(f"length {count}, past {past}", np.array([past], np.int32), np.array([count], np.int32))
        return
    b = graph.bucket
    for active in sorted({b, min(previous + 1, b)}):
        # From an almost empty to a full cache, row by row; rows that do not take part have length 0.
        for name, lengths in (("rising", np.linspace(1, rows - 1, b)), ("falling", np.linspace(rows - 1, 1, b))):
            count = (np.arange(b) < active).astype(np.int32)
            past = np.where(count, lengths, 0).astype(np.int32)
            yield Case(f"rows {active}, {name} lengths up to {past.max()}", past, count)
