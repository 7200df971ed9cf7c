"""Figures of the comparison against sums written out, and limits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from staticvl.tools.comparing.metrics import compare_logits, exact_match, iou, matched_iou, relative_error
from staticvl.tools.comparing.thresholds import DEFAULTS, ThresholdError, broken, coarser, read_thresholds


def pair(rows: int = 4, vocabulary: int = 60, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.standard_normal((rows, vocabulary)).astype(np.float32) * 3
    return a, a + noise * rng.standard_normal(a.shape).astype(np.float32), rng.integers(0, vocabulary, rows)


def test_every_figure_equals_brute_force() -> None:
    a, b, tokens = pair()
    f = compare_logits(a, b, tokens)
    p, q = ([[math.exp(v) for v in row] for row in x.astype(float)] for x in (a, b))
    p, q = ([[v / sum(row) for v in row] for row in x] for x in (p, q))
    kl = [sum(x * math.log(x / y) for x, y in zip(u, v, strict=True)) for u, v in zip(p, q, strict=True)]
    assert f.row_kl == pytest.approx(kl) and f.kl == pytest.approx(max(kl)) and f.kl_mean == pytest.approx(sum(kl) / 4)
    dots = [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True)]
    assert f.cosine == pytest.approx(min(dots))
    assert f.agreement == sum(int(x.argmax() == y.argmax()) for x, y in zip(a, b, strict=True)) / 4
    for values, found in ((p, f.reference_perplexity), (q, f.candidate_perplexity)):
        chosen = [math.log(row[token]) for row, token in zip(values, tokens, strict=True)]
        assert found == pytest.approx(math.exp(-sum(chosen) / 4))
    for band in f.bands:
        top = [sorted(range(60), key=lambda i, row=row: -row[i])[: band.top] for row in a.tolist()]
        errors = [max(abs(a[r, i] - b[r, i]) for i in of_row) for r, of_row in enumerate(top)]
        assert band.absolute == pytest.approx(max(errors))
        assert band.relative == pytest.approx(max(e / abs(a[r]).max() for r, e in enumerate(errors)))
    assert [band.top for band in f.bands] == [5, 50, None]


def test_the_first_divergence_names_tokens_and_margins() -> None:
    a = np.array([[3.0, 1.0, 0.0], [2.0, 5.0, 4.5], [1.0, 0.0, 9.0]])
    b = a.copy()
    b[1] = [2.0, 4.0, 4.75]
    f = compare_logits(a, b, np.array([0, 1, 2]))
    assert f.divergence is not None and f.agreement == pytest.approx(2 / 3)
    d = f.divergence
    assert (d.position, d.reference, d.candidate) == (1, 1, 2)
    assert (d.reference_margin, d.candidate_margin) == (0.5, 0.75)
    assert compare_logits(a, b, np.array([0, 1, 2]), tie=0.11).divergence is None, "0.5 of 5 is a tie"


def test_values_that_are_not_finite_are_infinitely_wrong() -> None:
    a, b, tokens = pair()
    b[2, 7] = np.nan
    f = compare_logits(a, b, tokens)
    assert f.relative == f.kl == math.inf and f.cosine == -1
    assert relative_error(a, b) == math.inf and relative_error(a, a[:2]) == math.inf
    assert broken(f, DEFAULTS["bfloat16"])


def test_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 60\) and \(3, 60\) for 4 tokens"):
        compare_logits(pair()[0], pair()[0][:3], pair()[2])


def test_boxes_and_answers() -> None:
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 0.1, 0.1), (0.5, 0.5, 1, 1)) == 0 and iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    right = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
    assert matched_iou(right, right[:1]) == 0.5 and matched_iou(right, right[::-1]) == 1
    assert exact_match("A red circle.", " A red  circle.\n") and not exact_match("A red circle.", "a red circle.")


def test_broken_limits_are_told(tmp_path: Path) -> None:
    f = compare_logits(*pair(noise=1e-7))
    assert broken(f, DEFAULTS["float32"]) == []
    clauses = broken(compare_logits(*pair(noise=0.5)), DEFAULTS["float32"])
    assert [clause.split(" 0")[0].split(" 1")[0] for clause in clauses][:2] == ["relative error", "KL"]
    assert any("at least 1" in clause for clause in clauses) == (compare_logits(*pair(noise=0.5)).agreement < 1)
    assert coarser("float32", "w8a16") == coarser("w8a16", "float16") == "w8a16"
    assert coarser("w4a16", "w8a8") == "w4a16"


def test_a_thresholds_file_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text("float32: {kl: 1e-3, agreement: 0.5}\n")
    limits = read_thresholds(path)
    assert limits["float32"] == dataclasses.replace(DEFAULTS["float32"], kl=1e-3, agreement=0.5)
    assert limits["w8a16"] == DEFAULTS["w8a16"] == read_thresholds(None)["w8a16"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("float32: [1]", r"limits.yaml: float32 is \[1\]; expected limits such as"),
        ("int4: {kl: 1}", "'int4' is no precision; expected one of float32, float16, bfloat16, w8a16"),
        ("float32: {KL: 1}", "float32: 'KL' is no limit; expected some of relative, kl"),
        ("float32: {kl: -1}", "float32: kl is -1; expected a number from 0 on"),
        ("float32: {kl: much}", "kl is 'much'; expected a number"),
        ("- 1", "holds list; expected a mapping from float32"),
        ("a: [", "is not YAML"),
    ],
)
def test_thresholds_that_make_no_sense(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(text)
    with pytest.raises(ThresholdError, match=said):
        read_thresholds(path)
