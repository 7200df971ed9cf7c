"""benchmarks.growth: bounds against sums by hand, and a whole run on the tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import growth
from benchmarks.growth import LeastWork, Run, lengths
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import is_cached, open_artifact

from .conftest import EMBEDDED
from .fakes import fake_artifact

GB_PER_S = 10.0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with arguments, on a machine that reads 10 GB/s."""
    monkeypatch.setattr(growth, "read_gb_per_s", lambda threads: GB_PER_S)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["growth", *map(str, arguments), "--repeats", "1", "--threads", "1"])
        growth.main()

    return run


def test_least_work_of_two_rows() -> None:
    """One layer with one head of 4, keys and values of 80 rows in float32: 32 bytes a token, 5120 for two rows.

    After 7 tokens each row has 8 in use. A token takes 16 operations for each of those that it looks at.
    """
    manifest = fake_artifact(slots=2, context=76).manifest
    assert manifest.cache.rows == 80
    graph = manifest.graph("decode", 2)
    graph = msgspec.structs.replace(graph, nbytes=10_000 + 5120, flops=5000 + 2 * 80 * 16)
    work, run = LeastWork(rows=80, pair_flops=16), Run(graph, past=7)
    assert work.nbytes(run) == 10_000 + 2 * 8 * 32
    assert work.flops(run) == 5000 + 2 * 8 * 16


def test_least_work_of_a_chunk() -> None:
    """Four tokens after 6 see 7, 8, 9 and 10."""
    graph = fake_artifact(context=76).manifest.graph("prefill", 4)
    graph = msgspec.structs.replace(graph, nbytes=10_000 + 2560, flops=5000 + 4 * 80 * 16)
    work, run = LeastWork(rows=80, pair_flops=16), Run(graph, past=6)
    assert work.nbytes(run) == 10_000 + 10 * 32
    assert work.flops(run) == 5000 + (7 + 8 + 9 + 10) * 16


def test_lengths_double_up_to_the_last() -> None:
    assert lengths(1023) == [16, 64, 128, 256, 512, 1023]
    assert lengths(64) == [16, 64]
    assert lengths(5) == [5]


def test_a_run_on_the_tiny_model(ran: Any, embedded_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran(embedded_artifact, "--out", tmp_path / "growth.json", "--chart", tmp_path / "growth.svg")
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data == json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    chart = (tmp_path / "growth.svg").read_text(encoding="utf-8")
    assert "<svg" in chart and chart.count('id="axes_') == 5  # four panels, and the rate of prompts in one of them
    assert data["machine"]["read_gb_per_s"] == GB_PER_S
    found = data["artifacts"][embedded_artifact.name]
    points = found["points"]
    assert {name: [point["size"] for point in panel] for name, panel in points.items()} == {
        "batch": [1, 2, 4],
        "cache": [16, 64, 128, 256, 511],
        "prompt": [16, 64, 128, 256, 511],
        "chunk": [0, 16, 64, 128, 256, 480],
        "largest": [0],
    }
    for point in points["prompt"]:  # in which chunks is up to their measured costs
        run = sum(int(name.removeprefix("prefill-")) * times for name, times in point["runs"].items())
        assert point["size"] <= run < point["size"] + 32
    for point in (point for panel in points.values() for point in panel):
        bound = max(point["memory_ms"], point["arithmetic_ms"])
        assert point["bound"] == ("memory" if bound == point["memory_ms"] else "arithmetic")
        assert point["of_bound"] == pytest.approx(bound / point["ms"], abs=0.002, rel=0.01)
    check_bounds(embedded_artifact, points, found["best_gop_per_s"])


def check_bounds(artifact: Path, points: dict[str, Any], gop_per_s: float) -> None:
    """Of the step after 16 tokens: 17 rows of every cache; of the others as many bytes and operations more as tokens see."""
    text = read_config(EMBEDDED).text
    graph = open_artifact(artifact).manifest.graph("decode", 1)
    weights = graph.nbytes - sum(spec.nbytes for spec in graph.inputs if is_cached(spec.name))
    row = 2 * text.layers * text.kv_heads * text.head_dim * 4
    by_length = {point["size"]: point for point in points["cache"]}
    assert by_length[16]["memory_ms"] == pytest.approx((weights + 17 * row) / GB_PER_S / 1e6, rel=1e-3)
    more = by_length[511]["memory_ms"] - by_length[16]["memory_ms"]
    assert more == pytest.approx(495 * row / GB_PER_S / 1e6, rel=1e-2)
    more = by_length[511]["arithmetic_ms"] - by_length[16]["arithmetic_ms"]
    pair = 4 * text.layers * text.heads * text.head_dim
    assert more == pytest.approx(495 * pair / gop_per_s / 1e6, rel=1e-2)


def test_artifacts_are_told_apart_by_name(ran: Any, embedded_artifact: Path) -> None:
    with pytest.raises(SystemExit, match="some are the same: artifact, artifact"):
        ran(embedded_artifact, embedded_artifact)


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        ({"tp": 2}, "was compiled for onnx, ranks: 2; expected onnx, ranks: 1"),
        ({"backend": "ascend"}, "was compiled for ascend, ranks: 1; expected onnx, ranks: 1"),
        ({"graphs": ()}, r"decodes \(\) rows at once; expected a graph of one row among them"),
    ],
)
def test_what_cannot_be_measured_is_named(
    ran: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: dict[str, Any], message: str
) -> None:
    manifest = msgspec.structs.replace(fake_artifact().manifest, **artifact)
    monkeypatch.setattr(growth, "read_manifest", lambda folder: manifest)
    with pytest.raises(SystemExit, match=message):
        ran(tmp_path)
