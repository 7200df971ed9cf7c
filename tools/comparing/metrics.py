"""Metrics of the difference of two sides: logits [n, V] of the same n forced tokens, answers, boxes.

`a` is the reference, `b` the candidate. Bands are by the reference's rank: the k tokens that it gives the largest logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .samples import Box

BANDS = (5, 50, 1000)  # and all of the vocabulary


@dataclass(frozen=True, slots=True)
class Band:
    """Errors among the reference's first `top` tokens (None: all)."""

    top: int | None
    absolute: float  # largest difference of two logits
    relative: float  # the same over the largest magnitude of the reference's logits in that row


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first forced position at which the sides would choose differently."""

    position: int
    reference: int  # token
    candidate: int
    reference_margin: float  # reference's logit of its own choice minus that of the candidate's choice
    candidate_margin: float  # the same the other way round
    reference_text: str = ""
    candidate_text: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """One sample's comparison; rows are forced positions."""

    bands: tuple[Band, ...]
    kl: float  # largest of all rows, in nats: reference against candidate
    kl_mean: float
    cosine: float  # smallest of all rows
    agreement: float  # share of rows with the same first token, ties counted as the same
    divergence: Divergence | None
    reference_perplexity: float
    candidate_perplexity: float
    row_errors: tuple[float, ...]  # relative, by row
    row_kl: tuple[float, ...]
    row_margins: tuple[float, ...]  # reference: first minus second logit, over the largest magnitude of its row

    @property
    def relative(self) -> float:
        return self.bands[-1].relative


def compare_logits(a: np.ndarray, b: np.ndarray, tokens: np.ndarray, tie: float = 0.0) -> Figures:
    """Figures of two [n, V] for forced tokens int [n]. Choices that differ by less than `tie` of the largest magnitude of a row
    count as the same. Values that are not finite make errors infinite. Raises ValueError where shapes differ."""
    if a.shape != b.shape or len(a) != len(tokens) or not len(a):
        raise ValueError(f"logits of the shapes {a.shape} and {b.shape} for {len(tokens)} tokens cannot be compared")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # numbers that are not finite are judged, not computed
        return _figures(a.astype(np.float64), b.astype(np.float64), tokens, tie)


def _figures(a: np.ndarray, b: np.ndarray, tokens: np.ndarray, tie: float) -> Figures:
    all_finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
    difference = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), math.inf)
    scale = np.maximum(np.abs(np.where(np.isfinite(a), a, 0)).max(1), 1e-30)  # [n]
    order = np.argsort(-a, axis=1, kind="stable")
    bands = tuple(_band(difference, scale, order, top) for top in (*(k for k in BANDS if k < a.shape[1]), None))
    logp, logq = _log_softmax(a), _log_softmax(b)
    kl = np.maximum((np.exp(logp) * (logp - logq)).sum(1), 0) if all_finite else np.full(len(a), math.inf)
    rows = np.arange(len(a))
    first, second, chosen = order[:, 0], order[:, min(1, a.shape[1] - 1)], b.argmax(1)
    differs = (first != chosen) & (a[rows, first] - a[rows, chosen] > tie * scale)
    return Figures(
        bands=bands,
        kl=float(kl.max()),
        kl_mean=float(kl.mean()),
        cosine=float(_cosine(a, b).min()) if all_finite else -1.0,
        agreement=float(1 - differs.mean()),
        divergence=_divergence(a, b, first, chosen, int(differs.argmax())) if differs.any() else None,
        reference_perplexity=_perplexity(logp, tokens),
        candidate_perplexity=_perplexity(logq, tokens),
        row_errors=tuple((difference.max(1) / scale).tolist()),
        row_kl=tuple(kl.tolist()),
        row_margins=tuple(((a[rows, first] - a[rows, second]) / scale).tolist()),
    )


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference over the largest magnitude of `a`; infinite where only one side is finite."""
    if a.shape != b.shape:
        return math.inf
    if not a.size:
        return 0.0
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return math.inf
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def matched_iou(expected: Sequence[Box], boxes: Sequence[Box]) -> float:
    """The mean over expected boxes of the intersection over union with the best of `boxes`; a missing box counts 0."""
    return sum(max((iou(box, each) for each in boxes), default=0.0) for box in expected) / len(expected)


def exact_match(expected: str, answer: str) -> bool:
    """Whether two texts are equal but for blanks around and between words."""
    return expected.split() == answer.split()


def with_texts(divergence: Divergence | None, text: Callable[[int], str]) -> Divergence | None:
    """A divergence with the texts of its tokens."""
    if divergence is None:
        return None
    d = divergence
    margins = d.reference_margin, d.candidate_margin
    return Divergence(d.position, d.reference, d.candidate, *margins, text(d.reference), text(d.candidate))


def _band(difference: np.ndarray, scale: np.ndarray, order: np.ndarray, top: int | None) -> Band:
    errors = difference if top is None else np.take_along_axis(difference, order[:, :top], axis=1)
    return Band(top, float(errors.max()), float((errors.max(1) / scale).max()))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)


def _perplexity(logp: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.exp(-logp[np.arange(len(tokens)), tokens].mean()))


def _divergence(a: np.ndarray, b: np.ndarray, first: np.ndarray, chosen: np.ndarray, position: int) -> Divergence:
    reference, candidate = int(first[position]), int(chosen[position])
    return Divergence(
        position,
        reference,
        candidate,
        float(a[position, reference] - a[position, candidate]),
        float(b[position, candidate] - b[position, reference]),
    )
