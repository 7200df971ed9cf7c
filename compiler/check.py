"""Certificates: each compiled graph against its eager definition, at the edges of its bucket (see cases.py).

The first output and every cache row that the step must have written are compared, and rows that it must not touch have to be
unchanged: of a cache in slots all earlier rows, of a cache in pages all others but those of padding. Of vision graphs all that
they write into the cache is compared. Candidates have to be the largest of the graph's own logits.

A cache in 8 bits rounds, and a value between two steps may go either way. So the definition attends over the integers that
the compiled graph has written, each of which has to be a rounding of the definition's own value: the attention over them is
compared as closely as everything else.
"""

from __future__ import annotations

import time

import numpy as np

from ..runtime.artifact import Certificate, CertificateCase, GraphSpec, ModelInfo, TensorSpec
from ..runtime.backends.base import Backend, Feed, Result, cache_name, new_feed
from .cases import Case, CaseMaker, find_cases, rows_of
from .page_cases import PADDING, written_places

TOLERANCE = 1e-4  # largest absolute difference over the largest magnitude
# Rounded activations: a result with a larger error than zero has would be useless. The loss of accuracy is measured on tasks,
# not by a certificate: layers of random weights amplify rounding without bound.
ROUNDING_TOLERANCE = 1.0


class CertificateError(RuntimeError):
    """A compiled graph differs from its definition."""


class Certifier:
    """Checks graphs of one artifact under construction against the eager definitions."""

    def __init__(
        self,
        reference: Backend,
        candidate: Backend,
        info: ModelInfo,
        *,
        vocab: int,
        exact: Backend | None = None,
        seed: int = 0,
    ) -> None:
        """`vocab`: rows of the embedding table. `exact`: runs the same graphs without the candidate's rounding."""
        self.reference, self.candidate, self.exact = reference, candidate, exact or candidate
        self.maker = CaseMaker(info, vocab, seed)

    def certify(self, graph: GraphSpec, previous: int, exact_graph: GraphSpec | None = None) -> tuple[Certificate, float]:
        """The certificate of one graph and the milliseconds of one run; `previous` is the next smaller bucket, or 0.

        Rounding is kept out of the comparison: a graph whose kernels round activations is checked by its `exact_graph`, on a
        backend of its own where arithmetic is less than float32. The error of rounding is measured separately.

        Raises CertificateError naming the graph, the case and the error when the tolerance is broken.
        """
        checked = exact_graph or graph
        run = self._vision if graph.kind == "vision" else self._text
        self.maker.restart()
        cases = []
        for case in find_cases(graph, previous):
            error = run(checked, case)
            cases.append(CertificateCase(name=case.name, error=error))
            _require(graph, case.name, error, TOLERANCE)
        self.exact.unload(checked)
        rounds = exact_graph is not None or self.exact is not self.candidate
        # The last case is the fullest: every row or the whole bucket, after as many tokens as fit.
        rounding = self._rounding(graph, list(find_cases(graph, previous))[-1]) if rounds else None
        cost = self._cost(graph)
        for each in (self.reference, self.candidate):
            each.unload(graph)
        return Certificate(reference="eager torch float32", tolerance=TOLERANCE, cases=tuple(cases), rounding=rounding), cost

    def _vision(self, graph: GraphSpec, case: Case) -> float:
        feed, tiles = self.maker.feed(graph, case), int(case.count[0])
        expected = self.reference.run(graph, feed).first[:tiles]
        error = relative_error(self.exact.run(graph, feed).first[:tiles], expected)
        for name in filter(None, (cache_name(spec.name, 0) for spec in graph.outputs)):
            error = max(error, relative_error(*(each.read_cache(name, 1) for each in (self.exact, self.reference))))
        return error

    def _text(self, graph: GraphSpec, case: Case) -> float:
        feed = self.maker.feed(graph, case)
        starts = self.maker.fill(graph, case, feed, _distinct(self.reference, self.exact))
        active, result = rows_of(graph, case), self.exact.run(graph, feed)
        self._copy_roundings(graph, self.exact)
        expected = self.reference.run(graph, feed).first
        error = max(relative_error(result.first[active], expected[active]), candidates_error(result, feed, active))
        for spec in graph.inputs:
            if "_cache." in spec.name:
                error = max(error, self._cache_error(spec, case, feed, self.maker.past(spec, case, feed, starts[spec.name])))
        return error

    def _rounding(self, graph: GraphSpec, case: Case) -> float:
        """The distance of the first output from the reference that rounding causes, in one case."""
        feed = self.maker.feed(graph, case)
        if graph.kind != "vision":
            self.maker.fill(graph, case, feed, _distinct(self.reference, self.candidate))
        result = self.candidate.run(graph, feed)
        self._copy_roundings(graph, self.candidate)
        expected = self.reference.run(graph, feed).first
        distance = np.linalg.norm(result.first - expected) / np.linalg.norm(expected)
        _require(graph, f"the candidates of {case.name}", candidates_error(result, feed, rows_of(graph, case)), TOLERANCE)
        _require(graph, f"{case.name} with rounding, in length", float(distance), ROUNDING_TOLERANCE)
        return float(distance)

    def _copy_roundings(self, graph: GraphSpec, backend: Backend) -> None:
        """Copy the roundings that a backend has written into its caches to the reference."""
        for spec in graph.inputs:
            if spec.dtype == "int8":
                self.reference.write_cache(spec.name, backend.read_cache(spec.name, spec.shape[0]))

    def _cache_error(self, spec: TensorSpec, case: Case, feed: Feed, old: np.ndarray) -> float:
        """Rows just written, against the reference; infinite where an earlier row was touched, or of pages any other place."""
        expected, actual = (each.read_cache(spec.name, len(old)) for each in (self.reference, self.exact))
        compare = rounding_error if spec.dtype == "int8" else relative_error
        if "block_table" in feed:
            written = written_places(feed["slot_mapping"], case.count, len(old))
            left = ~written
            left[PADDING] = False  # whatever of padding is written there
            same = np.array_equal(actual[left], old[left])
            return compare(actual[written], expected[written]) if same else float("inf")
        error = 0.0
        for b, (past, count) in enumerate(zip(case.past, case.count, strict=True)):
            if not np.array_equal(actual[b, :, :past], old[b, :, :past]):
                return float("inf")
            if count:
                written = np.s_[b, :, past : past + count]
                error = max(error, compare(actual[written], expected[written]))
        return error

    def _cost(self, graph: GraphSpec) -> float:
        """Milliseconds of one run: the best of a few, since other work of the machine only ever adds time."""
        feed = new_feed(graph)
        seconds: list[float] = []
        # At least two: one run may be delayed by a second, and the scheduler relies on these times.
        while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < 1.0):
            started = time.perf_counter()
            self.candidate.run(graph, feed)
            seconds.append(time.perf_counter() - started)
        return round(min(seconds) * 1e3, 4)


def _distinct(*backends: Backend) -> list[Backend]:
    return list({id(each): each for each in backends}.values())


def _require(graph: GraphSpec, case: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise CertificateError(
            f"{graph.name} differs from its definition by a relative {error:.2e} at {case} (allowed: {allowed:.0e}); "
            "this build must not be used, please report it"
        )


def candidates_error(result: Result, feed: Feed, active: np.ndarray) -> float:
    """The error of candidates against the logits beside them.

    It is infinite where they are not the largest, else the relative error of the softmax denominator. `active` [R]: rows that
    are not padding.
    """
    if result.candidates is None:
        return 0.0
    rows, candidates = result.first[active].astype(np.float64), result.candidates  # [R, V]
    logits, ids = candidates.logits[active], candidates.ids[active]
    largest = np.sort(rows, axis=1)[:, : -ids.shape[1] - 1 : -1]
    distinct = all(len(set(each)) == len(each) for each in ids.tolist())
    if not (distinct and np.array_equal(logits, largest) and np.array_equal(np.take_along_axis(rows, ids, axis=1), largest)):
        return float("inf")
    factor = np.broadcast_to(feed["inverse_temperature"], active.shape)[active]
    denominator = np.exp((rows - largest[:, :1]) * factor[:, None]).sum(axis=1)
    return float(np.abs(candidates.denominator[active] / denominator - 1).max())


def rounding_error(value: np.ndarray, expected: np.ndarray) -> float:
    """The largest deviation of 8-bit integers from roundings of `expected`, over the largest magnitude; infinite where a value
    is not finite."""
    beyond = np.maximum(np.abs(value - expected) - 0.5, 0)
    return float(beyond.max() / 127) if np.isfinite(expected).all() else float("inf")


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference divided by the largest magnitude of `expected`; infinite where a value is not finite."""
    if not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - expected).max() / max(float(np.abs(expected).max()), 1e-30))
