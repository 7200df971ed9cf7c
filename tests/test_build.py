"""Building artifacts: what is done again, what survives faults, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from staticvl import runtime
from staticvl.compiler import build as build_module
from staticvl.compiler import emit_onnx
from staticvl.compiler import make as make_module
from staticvl.compiler.build import BuildError, build
from staticvl.compiler.check import CertificateError
from staticvl.compiler.emit_onnx import UnsupportedOpError, emit
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.leftovers import JOURNAL
from staticvl.compiler.model_card import CARD
from staticvl.compiler.plan import Buckets, Options, PlanError
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import SCHEMA_VERSION, ArtifactError, FileSpec, GraphKey, open_artifact, verify, write_manifest
from staticvl.runtime.engine.fit import ContextError
from staticvl.weights.source import WeightsError

from .checkpoints import tiny_llava
from .checkpoints_mllama import tiny_mllama
from .fakes import noise

BUCKETS = Buckets(prefill=(8, 16), decode=(1, 2), vision=(1,), context=64, slots=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("build") / "checkpoint").folder


@pytest.fixture(scope="module")
def pristine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "artifact"
    build(Options(checkpoint=checkpoint, out=out, buckets=BUCKETS))
    return out


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    """A copy to change: copying keeps artifacts whole, which every test here relies on."""
    return shutil.copytree(pristine, tmp_path / "moved" / "elsewhere")


def options(checkpoint: Path, out: Path, **changes: object) -> Options:
    return Options(checkpoint=checkpoint, out=out, buckets=replace(BUCKETS, **changes))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs traced by torch from now on."""
    names: list[str] = []
    original = emit_onnx.trace
    monkeypatch.setattr(emit_onnx, "trace", lambda graph: names.append(graph.name) or original(graph))
    return names


def test_nothing_changed_does_nothing(checkpoint: Path, artifact: Path, traces: list[str]) -> None:
    before = (artifact / "manifest.json").read_bytes()
    report = build(options(checkpoint, artifact))
    assert traces == [] == list(report.traced)
    assert not report.converted
    assert (artifact / "manifest.json").read_bytes() == before


def test_one_more_bucket_costs_one_trace(checkpoint: Path, artifact: Path, traces: list[str]) -> None:
    before = {path.name: path.read_bytes() for path in artifact.glob("*.onnx")}
    report = build(options(checkpoint, artifact, prefill=(8, 16, 24)))
    assert traces == ["prefill-24"]
    assert not report.converted
    assert {name: (artifact / name).read_bytes() for name in before} == before
    assert verify(artifact).manifest.buckets("prefill") == (8, 16, 24)


def test_a_bucket_less_removes_its_file(checkpoint: Path, artifact: Path, traces: list[str]) -> None:
    build(options(checkpoint, artifact, prefill=(8,)))
    assert traces == []
    assert len(list(artifact.glob("prefill-*.onnx"))) == 1


def test_another_context_traces_text_graphs_only(checkpoint: Path, artifact: Path, traces: list[str]) -> None:
    build(options(checkpoint, artifact, context=72))
    assert sorted(traces) == ["decode-1", "decode-2", "prefill-16", "prefill-8"]


def test_other_weights_are_noticed(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path / "other", seed=9).folder
    report = build(options(other, artifact))
    assert report.converted
    assert len(report.traced) == 5
    assert len(list((artifact / "weights").iterdir())) == 1


def test_a_copied_checkpoint_is_the_same(checkpoint: Path, artifact: Path, tmp_path: Path, traces: list[str]) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "copied", copy_function=shutil.copyfile)
    report = build(options(copied, artifact))
    assert traces == []
    assert not report.converted


def test_interrupted_build_resumes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traces: list[str]
) -> None:
    make = make_module.GraphMaker.make

    def interrupted(self, *args):
        if len(traces) == 2:
            raise KeyboardInterrupt
        return make(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(make_module.GraphMaker, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(options(checkpoint, tmp_path / "a"))
    first = list(traces)
    traces.clear()
    with pytest.raises(ArtifactError, match="no manifest"):
        open_artifact(tmp_path / "a")
    with (tmp_path / "a" / JOURNAL).open("ab") as journal:
        journal.write(b'{"graph": {"kind": "pre')  # as a crash in the middle of a line leaves it
    build(options(checkpoint, tmp_path / "a"))
    assert len(first) == 2
    assert len(traces) == 3
    assert not set(first) & set(traces)
    assert not (tmp_path / "a" / JOURNAL).exists()
    verify(tmp_path / "a")


@pytest.mark.parametrize("changes", [{"prefill": (8, 16, 24)}, {"context": 80}])
def test_full_disk_leaves_the_old_artifact(
    checkpoint: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_atomically", full)
        patch.setattr(make_module, "write_atomically", full)
        with pytest.raises(BuildError, match=r"disk of .* is full; free some space"):
            build(options(checkpoint, artifact, **changes))
    assert verify(artifact).manifest.buckets("prefill") == (8, 16)
    assert runtime.load(artifact).generate("hello", max_new_tokens=2).token_ids


def test_full_disk_while_converting_leaves_the_old_artifact(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_llava(tmp_path / "other", seed=9).folder
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match="free"):
        build(options(other, artifact))
    verify(artifact)


def test_artifact_is_relocatable(checkpoint: Path, pristine: Path, artifact: Path) -> None:
    assert str(checkpoint.parent) not in (artifact / "manifest.json").read_text()
    assert all(str(pristine.parent).encode() not in path.read_bytes() for path in artifact.glob("*.onnx"))
    a, b = (runtime.load(folder).generate("hello", max_new_tokens=4, return_logits=True) for folder in (pristine, artifact))
    assert np.array_equal(a.logits, b.logits)


def test_verify_names_any_tampered_file(artifact: Path) -> None:
    paths = (path for path in artifact.rglob("*") if path.is_file() and path.stat().st_size and path.name != CARD)
    names = [str(path.relative_to(artifact)) for path in paths]
    assert {"manifest.json"} < set(names)
    for name in names:
        original = (artifact / name).read_bytes()
        middle = len(original) // 2
        (artifact / name).write_bytes(original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :])
        with pytest.raises(ArtifactError, match=name):
            verify(artifact)
        (artifact / name).write_bytes(original)
    verify(artifact)


def test_missing_and_cut_files_are_named_at_load(artifact: Path) -> None:
    weights = next((artifact / "weights").iterdir())
    data = weights.read_bytes()
    weights.write_bytes(data[:-8])
    with pytest.raises(ArtifactError, match=rf"{weights.name} has {len(data) - 8} bytes, expected {len(data)}"):
        runtime.load(artifact)
    weights.unlink()
    with pytest.raises(ArtifactError, match=rf"{weights.name} is missing"):
        runtime.load(artifact)


def test_damaged_files_are_built_again(checkpoint: Path, artifact: Path, traces: list[str]) -> None:
    graph = next(artifact.glob("decode-1-*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    weights = next((artifact / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    report = build(options(checkpoint, artifact))
    assert traces == ["decode-1"]
    assert report.converted
    verify(artifact)


def test_other_schema_version_is_refused(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION + 1, "new": 1}))
    with pytest.raises(ArtifactError, match=f"version {SCHEMA_VERSION + 1}, .* reads version {SCHEMA_VERSION}; compile"):
        runtime.load(artifact)


def test_manifest_outside_paths_are_refused(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    write_manifest(artifact, msgspec.structs.replace(manifest, files={**manifest.files, "../x": FileSpec(nbytes=1, sha256="")}))
    with pytest.raises(ArtifactError, match="outside the artifact"):
        open_artifact(artifact)


def test_folders_that_are_no_artifacts(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="compile it first"):
        runtime.load(checkpoint)
    with pytest.raises(ArtifactError, match="is not a folder"):
        runtime.load(tmp_path / "nowhere")
    with pytest.raises(BuildError, match="other files"):
        build(options(checkpoint, checkpoint))
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="is a file"):
        build(options(checkpoint, tmp_path / "file"))


def test_two_builds_in_one_folder(checkpoint: Path, artifact: Path) -> None:
    with build_module._locked(artifact), pytest.raises(BuildError, match="another staticvl compile"):
        build(options(checkpoint, artifact))


# ---- images by cross-attention


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options of a built artifact whose images enter by cross-attention."""
    folder = tmp_path_factory.mktemp("cross")
    checkpoint = tiny_mllama(folder / "checkpoint").folder
    buckets = Buckets(prefill=(8,), decode=(1, 2), context=64, slots=2, images=(1, 2))
    chosen = Options(checkpoint=checkpoint, out=folder / "artifact", buckets=buckets)
    build(chosen)
    return chosen


def other_place(chosen: Options, tmp_path: Path, **changes: object) -> Options:
    """The same options for a copy of the artifact, with other buckets."""
    out = shutil.copytree(chosen.out, tmp_path / "copy")
    return replace(chosen, out=out, buckets=replace(chosen.buckets, **changes))


def test_text_graphs_are_built_for_each_number_of_images(looking: Options) -> None:
    manifest = verify(looking.out).manifest
    assert {graph.graph_key for graph in manifest.graphs} == {
        ("vision", 4, 0),
        *(("prefill", 8, images) for images in (0, 1, 2)),
        *(("decode", rows, images) for rows in (1, 2) for images in (0, 1, 2)),
    }
    assert all(graph.certificate and graph.certificate.passed for graph in manifest.graphs)
    assert manifest.build.options == {"context": "64", "slots": "2", "images": "2", "text_before_image": "transformers"}
    vision = manifest.graph("vision", 4).certificate
    assert [case.name for case in vision.cases] == [f"tiles {n}" for n in (1, 2, 3, 4)]


def test_the_mode_of_text_before_images_costs_nothing(looking: Options, tmp_path: Path, traces: list[str]) -> None:
    report = build(replace(other_place(looking, tmp_path), text_before_image="meta"))
    assert traces == []
    assert not report.converted
    assert report.manifest.model.text_before_image == "meta"


def test_more_images_cost_their_own_graphs(looking: Options, tmp_path: Path, traces: list[str]) -> None:
    report = build(other_place(looking, tmp_path, images=(1, 2, 3)))
    assert sorted(traces) == ["decode-1-images-3", "decode-2-images-3", "prefill-8-images-3"]
    assert not report.converted
    assert report.manifest.cache.cross.images == 3
    model = runtime.load(tmp_path / "copy")
    images = [noise(n) for n in range(3)]
    out = model.generate("hi", images, max_new_tokens=3, ignore_eos=True)
    assert len(out.token_ids) == 3
    with pytest.raises(ContextError, match=r"2 images, but the artifact holds 1 .* --images 2"):
        build(other_place(looking, tmp_path / "few", images=(1,)))
        runtime.load(tmp_path / "few" / "copy").generate("hi", images[:2], max_new_tokens=1)


# ---- certificates


def test_every_bucket_is_certified_at_its_edges(pristine: Path) -> None:
    graphs = {graph.name: graph for graph in open_artifact(pristine).manifest.graphs}
    assert all(graph.certificate and graph.certificate.passed for graph in graphs.values())
    cases = [case.name for case in graphs["prefill-16"].certificate.cases]  # type: ignore[union-attr]
    for length in (16, 15, 9, 1):
        assert f"length {length}, past 0" in cases
    assert "length 16, past 56" in cases  # up to the last row of the cache


@pytest.mark.parametrize("shift", [1, -1], ids=["a key too many", "a key too few"])
def test_broken_mask_fails_a_certificate(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """The attention operator told of one earlier key too many, or too few."""
    lower = emit_onnx.LOWERINGS["staticvl.cached_attention"]

    def broken(e, node, q, k, v, k_cache, v_cache, lengths, heads):
        wrong = e.node("Max", [e.node("Add", [lengths, e.constant(shift, "int32")]), e.constant(0, "int32")])
        return lower(e, node, q, k, v, k_cache, v_cache, wrong, heads)

    monkeypatch.setitem(emit_onnx.LOWERINGS, "staticvl.cached_attention", broken)
    with pytest.raises(CertificateError, match="differs from its definition"):
        build(options(checkpoint, tmp_path / "a"))
    assert not (tmp_path / "a" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("staticvl.rms_norm", {"eps": 1e-2}),
        ("staticvl.layer_norm", {"eps": 1e-2}),
        ("staticvl.gelu", "QuickGelu"),
    ],
)
def test_wrong_lowerings_fail_a_certificate(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, change: object
) -> None:
    lower = emit_onnx.LOWERINGS[op]
    if isinstance(change, dict):
        monkeypatch.setitem(emit_onnx.LOWERINGS, op, lambda e, node, *args: lower(e, node, *args[:-1], change["eps"]))
    else:
        monkeypatch.setitem(
            emit_onnx.LOWERINGS, op, lambda e, node, x: e.node(change, [x], domain="com.microsoft", alpha=1.702)
        )
    with pytest.raises(CertificateError, match="differs from its definition"):
        build(options(checkpoint, tmp_path / "a"))


def test_an_op_without_lowering_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(emit_onnx.LOWERINGS, "staticvl.silu_mul")
    with pytest.raises(UnsupportedOpError, match=r"staticvl.silu_mul \(in .*text.layers.0.mlp"):
        build(options(checkpoint, tmp_path / "a"))


# ---- options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1024}, "context 1024 exceeds the model's 512 positions"),
        ({"prefill": (128,)}, "prefill bucket 128 exceeds the context 64"),
        ({"decode": (1,)}, "largest decode bucket is 1 but there are 2 slots"),
    ],
)
def test_plans_that_do_not_fit(checkpoint: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(options(checkpoint, tmp_path / "a", **changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "cuda"}, "backend 'cuda' is unknown; expected one of onnx, ascend"),
        ({"dtype": "int8"}, "dtype 'int8' is not available for onnx; available: float32, float16, bfloat16, auto"),
        ({"backend": "ascend", "dtype": "auto"}, "available: float16, bfloat16"),
        ({"backend": "ascend", "dtype": "float32"}, "available: float16, bfloat16"),
        ({"backend": "ascend", "eager": ("prefil",)}, "eager names prefil; expected some of vision, prefill, decode"),
        ({"eager": ("prefill",)}, "onnx has only compiled graphs"),
        ({"quant": "w4a4"}, "quantisation 'w4a4' is not available for onnx; available: none, w8a16, w8a8, w8a8.vision,"),
        ({"text_before_image": "none"}, "text before image is 'none'; expected one of transformers, meta"),
    ],
)
def test_options_of_later_releases(checkpoint: Path, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Options(checkpoint=checkpoint, out=tmp_path, **settings)  # type: ignore[arg-type]


def test_weights_in_8_bits(checkpoint: Path, pristine: Path, tmp_path: Path) -> None:
    """The whole path with quantised weights; how close it comes is told by its certificates and by the logits."""
    build(replace(options(checkpoint, tmp_path / "w8"), quant="w8a16"))
    exact, rounded = (
        runtime.load(folder).generate("hello world", max_new_tokens=1, return_logits=True).logits[0]
        for folder in (pristine, tmp_path / "w8")
    )
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 0 < error < 0.05
    for graph in open_artifact(tmp_path / "w8").manifest.graphs:
        assert graph.certificate.worst <= 1e-4  # everything but the rounding of activations
        assert (graph.certificate.rounding is None) == (graph.kind == "vision")
    assert not list((tmp_path / "w8").glob("*.partial"))


def test_twins_expand_one_weight_at_a_time(checkpoint: Path, tmp_path: Path) -> None:
    """Expanding all of them first would take the memory of the whole model in float32."""
    config, made = read_config(checkpoint), build(replace(options(checkpoint, tmp_path / "w8"), quant="w8a16")).manifest
    context = GraphContext(config=config, image=made.model.image, cache=made.cache, quant="w8a16")
    graph = define_graph(context, GraphKey("decode", 1))
    twin = onnx.load_from_string(emit(graph, made.weights, exact=True))
    twin_path = tmp_path / "w8" / "twin.onnx"
    onnx.save(twin, twin_path)
    settings = ort.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(twin_path, settings, providers=["CPUExecutionProvider"])
    session.run(None, {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.inputs})
    events = json.loads(Path(session.end_profiling()).read_text())
    order = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    waiting = most = 0
    for op in order:
        waiting += {"DequantizeLinear": 1, "FusedMatMul": -1}.get(op, 0)
        most = max(most, waiting)
    assert order.count("DequantizeLinear") > 10 and most <= 3
