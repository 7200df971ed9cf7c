"""Kernels that a machine chooses: every way gives the same numbers, and the fastest is taken."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from staticvl.compiler import kernels, other_work
from staticvl.compiler.build import build
from staticvl.compiler.cases import Case, CaseMaker
from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.graphs import GraphContext, GraphDef, define_graph
from staticvl.compiler.inputs import prepare
from staticvl.compiler.kernels import KernelTuner
from staticvl.compiler.other_work import OtherWork
from staticvl.compiler.plan import Buckets, Options, PlanError
from staticvl.compiler.progress import Progress
from staticvl.runtime import load
from staticvl.runtime.artifact import CacheSpec, GraphKey, Kernels, Kind, read_manifest
from staticvl.runtime.backends import ort
from staticvl.runtime.backends.cores import usable_cores
from staticvl.runtime.backends.open import open_backend
from staticvl.tools.cli import main

from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED

BUCKETS = Buckets(prefill=(8, 32), decode=(1, 2), vision=(1,), verify=(5,), context=96, slots=2)
DEFAULT = "as by default"


def options(out: Path, checkpoint: Path = EMBEDDED, **more: Any) -> Options:
    return Options(checkpoint=checkpoint, out=out, **{"buckets": BUCKETS, **more})


def tuner_of(made: Options) -> KernelTuner:
    """For an artifact that is there."""
    job, weights = prepare(made, Progress()), read_manifest(made.out).weights
    context = GraphContext(config=job.config, image=job.info.image, cache=job.plan.cache, quant=made.stored_quant)
    return KernelTuner(context=context, info=job.info, weights=weights, out=made.out)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> KernelTuner:
    """The trained tiny model with matrices in 16 bits: every question can be asked of it."""
    made = options(tmp_path_factory.mktemp("narrow") / "artifact", dtype="float16")
    build(made)
    return tuner_of(made)


def results(tuner: KernelTuner, kind: Kind, bucket: int, way: Kernels, past: int, count: int) -> list[np.ndarray]:
    """Logits of the whole model's graph, and all that it has written into the caches."""
    cache: CacheSpec = tuner.context.cache
    graph: GraphDef = replace(define_graph(tuner.context, GraphKey(kind, bucket)), kernels=way)
    path = tuner.out / "way.onnx.partial"
    path.write_bytes(emit(graph, tuner.weights))
    backend, spec = open_backend("onnx", tuner.out, cache), graph.spec(path.name)
    rows = bucket if kind == "decode" else 1
    case = Case("", np.full(rows, past, np.int32), np.full(rows, count, np.int32))
    maker = CaseMaker(tuner.info, tuner.context.config.text.all_embed_rows)
    feed = maker.feed(spec, case)
    maker.fill(spec, case, feed, [backend])
    logits = backend.run(spec, feed).first.copy()
    path.unlink()
    return [logits, *(backend.read_cache(name, rows) for name in cache.buffers())]


@pytest.mark.parametrize(("kind", "bucket", "count"), [("prefill", 32, 32), ("prefill", 32, 9), ("verify", 5, 5)])
@pytest.mark.parametrize(("tokens", "past"), [(1, 50), (3, 0), (8, 50), (31, 0)])
def test_a_chunk_may_attend_piece_by_piece(
    narrow: KernelTuner, kind: Kind, bucket: int, count: int, tokens: int, past: int
) -> None:
    whole = results(narrow, kind, bucket, Kernels(), past, count)
    pieces = results(narrow, kind, bucket, Kernels(attention_tokens=tokens), past, count)
    for expected, got in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kib", [1, 16, 4096])
def test_matrices_may_be_widened_by_other_parts(narrow: KernelTuner, kib: int) -> None:
    expected, *_ = results(narrow, "decode", 2, Kernels(), 20, 1)
    got, *_ = results(narrow, "decode", 2, Kernels(widened_kib=kib), 20, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def timed(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> list[list[str]]:
    """Let every way take what is said of it, anything else 10 ms; which ways were compared."""
    trials: list[list[str]] = []

    def measure(self: KernelTuner, graph: GraphDef, cache: CacheSpec, ways: Sequence[Kernels]) -> list[float]:
        trials.append([way.described for way in ways])
        return [times.get(way.described, 10.0) for way in ways]

    monkeypatch.setattr(KernelTuner, "_times", measure)
    monkeypatch.setattr(OtherWork, "part", lambda self: 0.0)
    monkeypatch.setattr(kernels, "usable_cores", lambda: 8)
    monkeypatch.setattr(kernels, "ATTENTION_TOKENS", (4, 16))
    return trials


def test_each_question_builds_on_the_answers_before(narrow: KernelTuner, monkeypatch: pytest.MonkeyPatch) -> None:
    four, two_cores = "4 tokens attend at a time", "4 tokens attend at a time, 8192 KiB upcast at a time, 2 cores"
    trials = timed(monkeypatch, {four: 7.0, "4 tokens attend at a time, 8192 KiB upcast at a time": 6.0, two_cores: 5.0})
    found = narrow.choose(GraphKey("prefill", 32))
    assert (found.attention_tokens, found.widened_kib, found.cores) == (4, 8192, 2)
    assert trials[0] == [DEFAULT, four, "16 tokens attend at a time"]
    assert trials[1][0] == four
    assert [each.rpartition(", ")[2] for each in trials[2][1:]] == ["4 cores", "2 cores", "one core"]
    assert found.measured[DEFAULT] == 10.0 and found.measured[two_cores] == 5.0
    assert len(found.measured) == 3 + 3 + 3


def test_the_default_stays_unless_it_is_beaten_clearly(narrow: KernelTuner, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = timed(monkeypatch, {"one core": 9.9, "4 cores": 9.85})
    found = narrow.choose(GraphKey("decode", 2))
    assert msgspec.structs.replace(found, measured={}) == Kernels()
    assert len(trials) == 2, "a step of one token has no pieces"
    monkeypatch.setattr(kernels, "MARGIN", 0.005)
    assert narrow.choose(GraphKey("decode", 2)).cores == 4


def test_nothing_is_chosen_while_others_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, {"4 tokens attend at a time": 5.0, "4 tokens attend at a time, one core": 2.0, "one core": 2.0})
    made = options(tmp_path / "artifact", buckets=Buckets(prefill=(8,), decode=(1,), vision=(1,), context=64), tune=True)
    monkeypatch.setattr(OtherWork, "part", lambda self: 0.6)
    disturbed = {graph.kind: graph.kernels for graph in build(made).manifest.graphs}
    for kind in ("prefill", "decode"):
        found = disturbed[kind]
        assert found and (found.cores, found.attention_tokens, found.busy) == (0, 0, 0.6)
        assert found.measured["as by default"] == 10.0
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["show", str(made.out)]) == 0
    assert "not tuned, other processes took 60% of the cores" in capsys.readouterr().out

    monkeypatch.setattr(OtherWork, "part", lambda self: 0.1)
    again = build(made)
    assert sorted(again.traced) == ["decode-1", "prefill-8"], "what was tuned for nobody is tuned now, and only that"
    chosen = {graph.kind: graph.kernels for graph in again.manifest.graphs}
    assert chosen["prefill"] and chosen["decode"] and (chosen["decode"].cores, chosen["prefill"].cores) == (1, 1)
    assert build(made).traced == ()


def test_other_work_is_that_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = OtherWork()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        assert begun.part() > 0.25 / usable_cores()
    finally:
        other.kill()
        other.wait()

    fields = namedtuple("fields", ["user", "system", "idle", "iowait", "steal", "guest"])
    now, own, cores = 100.0, 7.0, [fields(50, 5, 40, 3, 2, 20), fields(9, 9, 9, 9, 9, 9)]
    monkeypatch.setattr(other_work, "core_numbers", lambda: (0,))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(time, "process_time", lambda: own)
    monkeypatch.setattr(psutil, "cpu_times", lambda *, percpu: cores)
    begun = OtherWork()
    now, own, cores = 110.0, 12.0, [fields(56, 6, 41, 4, 3, 26), fields(90, 90, 9, 9, 9, 9)]
    assert begun.part() == pytest.approx(0.3), "8 of 10 seconds of core 0 were work, guests' among it, 5 of them its own"


def test_what_is_measured_is_there_for_one_run_only(narrow: KernelTuner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    before = sorted(narrow.out.iterdir())
    found = narrow.choose(GraphKey("prefill", 32))
    assert min(found.measured.values()) > 0
    assert sorted(narrow.out.iterdir()) == before


@pytest.mark.parametrize("images", [0, 1])
def test_layers_that_attend_to_images_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    made = options(
        tmp_path / "artifact",
        tiny_mllama(tmp_path / "checkpoint").folder,
        buckets=Buckets(prefill=(8,), decode=(1,), images=(1,), context=32, slots=1),
    )
    build(made)
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "usable_cores", lambda: 2)
    found = tuner_of(made).choose(GraphKey("decode", 1, images))
    assert set(found.measured) == {DEFAULT, "one core"}


def test_an_artifact_says_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch, {"4 tokens attend at a time": 5.0})
    made = options(tmp_path / "artifact", buckets=Buckets(prefill=(8,), decode=(1,), vision=(1,), context=200), tune=True)
    chosen = {graph.kind: graph.kernels for graph in build(made).manifest.graphs}
    assert not chosen["vision"] and chosen["prefill"] and chosen["decode"]
    assert (chosen["prefill"].attention_tokens, chosen["decode"].attention_tokens) == (4, 0)
    assert build(made).traced == (), "what was measured is not measured again"
    assert read_manifest(made.out).recompilation(context=300).endswith("--context 300 --slots 1 --tune")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["show", str(made.out)]) == 0
    shown_text = capsys.readouterr().out
    assert "tuned on" in shown_text and "4 tokens attend at a time" in shown_text

    plain = options(tmp_path / "plain", buckets=made.buckets)
    assert not any(graph.kernels for graph in build(plain).manifest.graphs)
    answers = []
    for folder in (made.out, plain.out):
        with load(folder) as model:
            answers.append(model.generate("What is in the picture?", max_new_tokens=8).token_ids)
    assert answers[0] == answers[1]
    shutil.rmtree(tmp_path)


def test_sessions_have_the_cores_that_were_chosen(narrow: KernelTuner, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = define_graph(narrow.context, GraphKey("decode", 1))
    graph = replace(plain, kernels=Kernels(cores=3))
    (narrow.out / "cores.onnx.partial").write_bytes(emit(graph, narrow.weights))
    seen: list[int | None] = []
    right = ort._options
    monkeypatch.setattr(ort, "_options", lambda **given: (seen.append(given["threads"]), right(**given))[1])
    monkeypatch.setattr(ort, "usable_cores", lambda: 4)
    for backend in (
        ort.OrtBackend(narrow.out, narrow.context.cache, few_cores=1),
        ort.OrtBackend(narrow.out, narrow.context.cache, threads=2),
    ):
        backend.load(graph.spec("cores.onnx.partial"))
        backend.load(plain.spec("cores.onnx.partial"))
        backend.unload(graph.spec("cores.onnx.partial"))
        backend.load(plain.spec("cores.onnx.partial"))
    monkeypatch.setattr(ort, "usable_cores", lambda: 2)  # a smaller machine than the one that chose
    ort.OrtBackend(narrow.out, narrow.context.cache).load(graph.spec("cores.onnx.partial"))
    assert seen == [3, 1, 2, 2, 2]
    (narrow.out / "cores.onnx.partial").unlink()


@pytest.mark.parametrize(
    ("more", "what"), [({"backend": "ascend"}, "backend ascend"), ({"tp": 2}, "2 ranks"), ({"pp": 2}, "2 ranks")]
)
def test_only_onnx_graphs_of_one_process_are_measured(more: dict[str, Any], what: str) -> None:
    with pytest.raises(PlanError, match=f"tune is given with {what}, but it measures ONNX graphs .*; leave --tune out"):
        options(Path("unused"), tune=True, **more)
