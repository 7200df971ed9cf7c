"""Candidates found in graphs: the op's definition against sorting, onnxruntime's way against the definition (Ascend's is in
test_lower_ascend.py), artifacts that have them, and faults that certificates see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.check import CertificateError, candidates_error
from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.fingerprint import GraphDigests
from staticvl.compiler.graphs import GraphDef, trace
from staticvl.compiler.inputs import plan_only, prepare
from staticvl.compiler.make import GraphMaker
from staticvl.compiler.onnx_graph import LOWERINGS
from staticvl.compiler.plan import Buckets, Options, PlanError
from staticvl.compiler.progress import Progress
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import CANDIDATES, GraphKey, GraphSpec, TensorSpec, WeightSpec, read_manifest
from staticvl.runtime.backends.base import Result
from staticvl.runtime.sampling.candidates import Candidates
from staticvl.tools import ascend_acceptance
from staticvl.tools.comparing.operator_errors import OperatorComparison

from .checkpoints import tiny_llava
from .fake_backend import FakeBackend
from .fakes import HIDDEN, VOCAB, fake_artifact, noise

COUNT = 6


class Top(nn.Module):
    def forward(self, logits: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.staticvl.top_tokens(logits, inverse_temperature, COUNT)


def graph_of(given: dict[str, np.ndarray]) -> GraphDef:
    inputs = [TensorSpec(name=name, dtype="float32", shape=each.shape) for name, each in given.items()]
    made = zip(CANDIDATES, Top()(*map(torch.from_numpy, given.values())), strict=True)
    outputs = [TensorSpec(name=name, dtype=str(x.dtype).removeprefix("torch."), shape=tuple(x.shape)) for name, x in made]
    return GraphDef(GraphKey("decode", len(given["logits"])), Top(), tuple(inputs), tuple(outputs))


def by_onnx(logits: Tensor, inverse_temperature: Tensor) -> list[np.ndarray]:
    given = {"logits": logits.numpy(), "inverse_temperature": inverse_temperature.numpy()}
    session = ort.InferenceSession(emit(graph_of(given), {}), providers=["CPUExecutionProvider"])
    return list(session.run(None, given))  # type: ignore[arg-type]


def rows(count: int, vocab: int, levels: int) -> Tensor:
    """Each value many times, where there are few levels; all below 0, which is no padding."""
    random = torch.Generator().manual_seed(vocab + levels)
    found = torch.randint(0, levels, (count, vocab), generator=random) * (20 / levels) - 30
    found[0, : vocab // 2] = -torch.inf
    return found


@pytest.mark.parametrize("levels", [2, 40, 100_000])
@pytest.mark.parametrize(("count", "vocab"), [(1, COUNT), (2, 50), (3, 1792), (1, 1793), (4, 5000), (2, 128 * 20)])
@pytest.mark.parametrize("way", ["definition", "onnx"])
def test_the_largest_of_rows_of_any_length(way: str, count: int, vocab: int, levels: int) -> None:
    """Whole blocks or not, so few that one search is enough, equals, and rows that are half -inf."""
    logits, factor = rows(count, vocab, levels), torch.linspace(0.5, 2, count)
    found = by_onnx(logits, factor) if way == "onnx" else [each.numpy() for each in Top()(logits, factor)]
    values, ids, mass = found
    assert (values.dtype, ids.dtype, mass.dtype) == (np.float32, np.int32, np.float32)
    expected = np.sort(logits.numpy(), axis=1)[:, ::-1][:, :COUNT]
    np.testing.assert_array_equal(values, expected)
    for row, chosen, kept in zip(logits.numpy(), ids, expected, strict=True):
        real = kept > -np.inf
        np.testing.assert_array_equal(row[chosen[real]], kept[real])
        assert len(set(chosen[real])) == real.sum()
    wide = logits.double().numpy()
    by_hand = np.exp((wide - wide.max(1, keepdims=True)) * factor.double().numpy()[:, None]).sum(1)
    np.testing.assert_allclose(mass, by_hand, rtol=1e-5)


def test_one_temperature_for_all_tokens_of_a_draft() -> None:
    logits = rows(3, 3000, 100_000)
    alone, together = by_onnx(logits, torch.tensor([1.5])), by_onnx(logits, torch.full((3,), 1.5))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_comparison_does_not_mind_the_order_of_equals() -> None:
    """Operator by operator, ids of equals may be others: certificates look at them."""
    given = {"logits": np.ones((1, 9), np.float32), "inverse_temperature": np.ones(1, np.float32)}
    walk = OperatorComparison(trace(graph_of(given)), {})
    assert walk.run([torch.from_numpy(each) for each in given.values()], lambda node, expected: expected.flip(-1)) == {}


# --- Artifacts ----------------------------------------------------------------------------------------------------------

BUCKETS = Buckets(prefill=(8,), decode=(2,), vision=(1,), verify=(3,), context=64, slots=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("candidates") / "checkpoint").folder


def options(checkpoint: Path, out: Path, candidates: int | None, **changes: Any) -> Options:
    return Options(checkpoint=checkpoint, out=out, buckets=BUCKETS, candidates=candidates, **changes)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("candidates") / "artifact"
    build(options(checkpoint, out, COUNT))
    return out


def test_an_artifact_with_candidates_answers_as_from_whole_rows(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, drawn and with drafts; rows are looked at whole by draws that candidates do not decide, and by no others."""
    manifest = read_manifest(artifact)
    assert {graph.kind: graph.candidates for graph in manifest.graphs} == {"vision": 0, "prefill": 6, "decode": 6, "verify": 6}
    assert manifest.recompilation().endswith(f"--context 64 --slots 2 --speculate 2 --candidates {COUNT}")
    model, seen = runtime.load(artifact, reuse=False), []
    engine, whole = model.engine, model.engine.next_token.of_whole_row
    monkeypatch.setattr(
        engine.next_token, "of_whole_row", lambda sequence, row: (seen.append(len(row)), whole(sequence, row))[1]
    )

    def answers(**settings: Any) -> list[list[int]]:
        request_settings = {"max_new_tokens": 10, "ignore_eos": True, "seed": 3, **settings}
        return [list(out.token_ids) for out in model.generate(["one two one two", "two"], [[noise(1)], []], **request_settings)]

    settings: tuple[tuple[dict[str, Any], int], ...] = (
        ({"temperature": 0.0}, 0),
        ({"temperature": 0.0, "speculate": 2}, 0),
        ({"temperature": 0.8, "top_k": 3}, 5),  # the likeliest may be one that is never drawn
        ({"temperature": 0.8, "top_p": 0.9}, 20),
    )
    for each, most in settings:
        seen.clear()
        found = answers(**each)
        assert len(seen) <= most
        with monkeypatch.context() as context:
            context.setattr(engine.next_token, "_from_candidates", lambda *_: None)
            assert answers(**each) == found
    assert seen == [manifest.model.vocab_size] * len(seen)


def test_another_number_of_candidates_is_another_text_graph(checkpoint: Path, artifact: Path) -> None:
    """The vision graph stays as it is."""
    assert not build(options(checkpoint, artifact, COUNT)).traced

    def digests(candidates: int) -> dict[str, str]:
        job = prepare(options(checkpoint, artifact, candidates), Progress())
        made = GraphDigests(job.options, job.config, job.info, job.plan, "")
        return {graph.kind: made.of(graph) for graph in job.plan.graphs}

    few, more = digests(COUNT), digests(COUNT + 1)
    assert {kind for kind in few if few[kind] != more[kind]} == {"prefill", "decode", "verify"}


def of_two_alike(right: Callable[..., Any], e: Any, *args: Any) -> Any:
    """The second candidate twice."""
    return [e.node("Gather", [x, e.constant([0, 1, 1, 3, 4, 5])], axis=1) for x in right(e, *args)[:2]] + [right(e, *args)[2]]


def ids_by_one(right: Callable[..., Any], e: Any, *args: Any) -> Any:
    values, ids, mass = right(e, *args)
    return values, e.node("Add", [ids, e.constant(1, "int32")]), mass


def smallest(right: Callable[..., Any], e: Any, node: Any, logits: str, factor: str, count: int) -> Any:
    values, ids = e.node("TopK", [logits, e.constant([count])], outputs=2, largest=0)
    return values, e.node("Cast", [ids], to=6), right(e, node, logits, factor, count)[2]


def no_temperature(right: Callable[..., Any], e: Any, node: Any, logits: str, factor: str, count: int) -> Any:
    return right(e, node, logits, e.constant([1.0], "float32"), count)


def test_what_certificates_say_of_candidates() -> None:
    """A row whose second and third are equal, and one that means nothing."""
    rows = np.array([[1, 3, 2, 2, -1], [9, 9, 9, 9, 9]], np.float32)
    mass = np.exp((rows[:1] - 3) * 0.5).sum(dtype=np.float32)

    def error(logits: list[float], ids: list[int], factor: float = 1.0) -> float:
        found = Candidates(np.array([logits, [0] * 3], np.float32), np.array([ids, [0] * 3]), np.array([mass * factor, 0]))
        feed = {"inverse_temperature": np.array([0.5], np.float32)}
        return candidates_error(Result(rows.__getitem__, found), feed, np.array([True, False]))

    assert error([3, 2, 2], [1, 2, 3]) == error([3, 2, 2], [1, 3, 2]) < 1e-6
    assert error([3, 2, 2], [1, 2, 3], 1.01) == pytest.approx(0.01, rel=1e-3)
    assert error([3, 2, 2], [1, 2, 2]) == np.inf  # one twice
    assert error([3, 2, 2], [1, 2, 0]) == np.inf  # another one's id
    assert error([3, 2, 1], [1, 2, 0]) == np.inf  # not the largest
    assert error([3, 2, 1.9], [1, 2, 3]) == np.inf  # ids without their logits


@pytest.mark.parametrize("fault", [of_two_alike, ids_by_one, smallest, no_temperature])
def test_wrong_candidates_are_refused(
    checkpoint: Path, artifact: Path, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LOWERINGS["staticvl.top_tokens"]
    monkeypatch.setitem(LOWERINGS, "staticvl.top_tokens", lambda e, *args: fault(right, e, *args))
    job = prepare(options(checkpoint, artifact, COUNT), Progress())
    graphs = GraphMaker(job.options, job.config, job.info, job.plan, read_manifest(artifact).weights)
    with pytest.raises(CertificateError, match="decode-2 differs from its definition"):
        graphs.make(GraphKey("decode", 2), "again")


def test_how_many_candidates_there_may_be(checkpoint: Path) -> None:
    def planned(candidates: int | None, **changes: Any) -> int:
        return plan_only(options(checkpoint, Path(), candidates, **changes)).plan.candidates

    assert planned(None) == planned(0) == planned(None, backend="ascend", pp=2) == 0
    assert planned(None, backend="ascend") == 64
    assert planned(1024) == read_config(checkpoint).text.vocab_size < 1024
    for wrong in (-1, 1025, True):
        with pytest.raises(PlanError, match=r"candidates is .*; expected a number of tokens from 1 to 1024, or 0 for none"):
            planned(wrong)
    with pytest.raises(PlanError, match="candidates is 6 and pp is 2"):
        planned(6, pp=2)


def test_the_definition_works_without_data() -> None:
    """As torch.export needs it."""
    made = Top()(torch.empty(2, 50, device="meta"), torch.empty(2, device="meta"))
    for a, b in zip(made, Top()(torch.zeros(2, 50), torch.ones(2)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_a_card_that_finds_others_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The acceptance command looks at every text graph's candidates."""
    manifest = fake_artifact(candidates=4, vision={1: 1.0}).manifest
    table = WeightSpec(file="", dtype="float16", shape=(VOCAB, HIDDEN), offset=0, nbytes=0)
    manifest = msgspec.structs.replace(manifest, weights={"text.embed.weight": table})
    backend = FakeBackend(manifest)
    model = SimpleNamespace(engine=SimpleNamespace(backend=backend, manifest=manifest))
    assert {name.partition("/")[0] for name in ascend_acceptance._outputs(model, "npu")} == {g.name for g in manifest.graphs}
    run = backend.run

    def odd(graph: GraphSpec, *given: Any) -> Result:
        result = run(graph, *given)
        if graph.kind != "decode" or result.candidates is None:
            return result
        return replace(result, candidates=replace(result.candidates, ids=result.candidates.ids[:, ::-1]))

    monkeypatch.setattr(backend, "run", odd)
    with pytest.raises(SystemExit, match=r"decode-\d on npu gives candidates that are not the largest.*--candidates 0"):
        ascend_acceptance._outputs(model, "npu")
