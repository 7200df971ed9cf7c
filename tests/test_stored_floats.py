"""Floats in 16 bits on ONNX Runtime: what is stored in them, that nothing is lost by it, and what memory holds of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.fingerprint import weights_key
from staticvl.compiler.graphs import GraphDef
from staticvl.compiler.inputs import plan_only
from staticvl.compiler.onnx_graph import products
from staticvl.compiler.plan import Buckets, Options
from staticvl.model_defs.config import read_config
from staticvl.model_defs.layers import Linear, Table
from staticvl.runtime.artifact import GraphKey, Manifest, TensorSpec
from staticvl.runtime.backends import ort
from staticvl.runtime.backends.base import new_feed
from staticvl.runtime.backends.host_cache import HostCache
from staticvl.tools.cli import main
from staticvl.tools.comparing.thresholds import precision
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.lora import open_adapter
from staticvl.weights.quantize import quantize
from staticvl.weights.source import open_source
from staticvl.weights.storage import Floats
from staticvl.weights.tensors import StoredTensor, WeightsError
from staticvl.weights.weight_map import kept_dtypes, match, targets
from staticvl.weights.writer import lay_out, write_weight_file

from .checkpoints import tiny_llava
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .test_lora import adapt
from .tiny_families import GOLDEN_QWEN

BUCKETS = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=64, slots=1)
TABLE = "text.embed.weight"


def options(folder: Path, dtype: str, **more: Any) -> Options:
    return Options(checkpoint=folder / "checkpoint", out=folder / "a", buckets=BUCKETS, dtype=dtype, **more)


def in_16_bits(manifest: Manifest) -> set[str]:
    return {name for name, spec in manifest.weights.items() if spec.dtype in ("float16", "bfloat16")}


# ---- what is stored in 16 bits

KEPT = {TABLE: "bfloat16", "projector.up.weight": "float16", "text.norm.weight": "bfloat16"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("float32", "float32", "float32", "float32")),
        ({"dtype": "float16"}, ("float16", "float16", "float32", "float32")),
        ({"dtype": "auto"}, ("bfloat16", "float16", "float32", "float32")),
        ({"quant": "w8a16"}, ("bfloat16", "float32", "float32", "float32")),
        ({"quant": "w8a16", "dtype": "float32"}, ("float32", "float32", "float32", "float32")),
        ({"quant": "w8a16", "dtype": "bfloat16"}, ("bfloat16", "bfloat16", "float32", "float32")),
        ({"quant": "w8a16", "backend": "ascend"}, ("float16", "float16", "float16", "float16")),
    ],
)
def test_what_is_stored_in_what(settings: dict[str, str], expected: tuple[str, ...]) -> None:
    """The table, a projector, a norm, scales of blocks. Only Ascend computes in what it stores."""
    options_of = Options(checkpoint=Path(), out=Path(), **settings)  # type: ignore[arg-type]
    floats = options_of.floats(KEPT)
    shapes = {TABLE: (4, 4), "projector.up.weight": (4, 4), "text.norm.weight": (4,)}
    assert (*(floats.of(name, shape) for name, shape in shapes.items()), floats.scales) == expected
    assert options_of.cache_dtype == ("float16" if options_of.backend == "ascend" else "float32")


def test_a_dtype_is_kept_where_numbers_are_only_moved(tmp_path: Path) -> None:
    tiny = tiny_mllama(tmp_path / "checkpoint", dtype=torch.bfloat16)
    config = read_config(tiny.folder)
    kept, shapes = kept_dtypes(match(config, open_source(tiny.folder).tensors)), targets(config)
    computed = {name for name, dtype in kept.items() if dtype == "float32"}
    assert kept[TABLE] == kept["projector.weight"] == "bfloat16"
    tables = {name for name in computed if len(shapes[name]) > 1}
    assert tables == {"vision.positions.weight", "vision.pre_tile.weight", "vision.post_tile.weight"}, (
        "scaled or mixed by gates"
    )
    assert all("gate" in name for name in computed - tables), computed


def test_what_an_adapter_changes_is_float32(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "checkpoint", dtype=torch.float16)
    adapt(tiny.model, tmp_path / "adapter")
    config, plain = read_config(tiny.folder), open_source(tiny.folder)
    adapted = open_adapter(tmp_path / "adapter", config, plain)
    plan = match(config, plain.tensors)
    changed = {name for name, recipe in plan.recipes.items() if recipe.tensors[0].name in adapted.adapted}
    assert changed and set(kept_dtypes(plan).values()) == {"float16"}
    after = kept_dtypes(match(config, adapted.tensors))
    assert {name for name in after if after[name] == "float32"} == changed


def test_another_dtype_is_another_set_of_weight_files(tmp_path: Path) -> None:
    """Left open, quantised layers come with a table as the checkpoint has it: that is not float32."""
    config = read_config(tiny_llava(tmp_path / "checkpoint").folder)
    options_of = [options(tmp_path, dtype, quant="w8a16") for dtype in ("", "float32", "float16", "auto")]
    assert len({weights_key({}, config, each, None) for each in options_of}) == len(options_of)


def test_a_forecast_needs_no_weights(tmp_path: Path) -> None:
    tiny_llava(tmp_path / "checkpoint", dtype=torch.float16)
    options_of = options(tmp_path, "auto")
    sizes = [plan_only(options_of).sizes, plan_only(replace(options_of, dtype="float32")).sizes]
    for path in options_of.checkpoint.glob("*.safetensors"):
        path.unlink()
    assert plan_only(options_of).sizes == sizes[0]
    assert 0.5 * sizes[1]["weight_bytes"] < sizes[0]["weight_bytes"] < 0.52 * sizes[1]["weight_bytes"]
    assert sizes[0]["cache_bytes"] == sizes[1]["cache_bytes"]


# ---- nothing is lost, and memory holds it once


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint in bfloat16 compiled as it is, every matrix in several parts; and its transformers model."""
    folder = tmp_path_factory.mktemp("kept")
    tiny = tiny_llava(folder / "checkpoint", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "UPCAST_BYTES", 3000)
        manifest = build(options(folder, "auto")).manifest
    assert in_16_bits(manifest) == {name for name, spec in manifest.weights.items() if len(spec.shape) > 1}
    return folder / "a", tiny.model


def test_logits_are_those_of_the_checkpoint(kept: tuple[Path, Any]) -> None:
    model = runtime.load(kept[0])
    out = model.generate("What is it?", raw=True, max_new_tokens=1, return_logits=True)
    ids = torch.tensor([model.processor.tokenizer.encode("What is it?", add_bos=True)])
    with torch.inference_mode():
        expected = kept[1](input_ids=ids).logits[0, -1].numpy()
    assert np.abs(out.logits[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    assert precision(model.artifact.manifest) == "float32", "compared as closely as if it were stored in float32"


@pytest.fixture
def opened(kept: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Opens and runs one graph of the artifact: the graph as onnxruntime runs it, and the operators in the order of a run."""
    plain = ort._options

    def recording(**settings: Any) -> Any:
        options = plain(**settings)
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "run")
        return options

    def run(kind: str) -> tuple[onnx.GraphProto, list[str]]:
        monkeypatch.setattr(ort, "_options", recording)
        model = runtime.load(kept[0])
        graph = next(graph for graph in model.artifact.manifest.graphs if graph.kind == kind)
        backend = model.engine.backend
        backend.run(graph, new_feed(graph))
        session = backend.sessions[graph.file]  # type: ignore[attr-defined]
        events = json.loads(Path(session.end_profiling()).read_text())
        order = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        return onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph, order

    return run


@pytest.mark.parametrize("kind", ["vision", "prefill", "decode"])
def test_a_session_keeps_no_float32_copy(opened: Callable[[str], Any], kind: str) -> None:
    graph, _ = opened(kind)
    floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    narrow = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16]
    assert len(narrow) > 10 and all(len(tensor.dims) < 2 for tensor in floats)


@pytest.mark.parametrize("kind", ["vision", "prefill", "decode"])
def test_one_part_is_widened_at_a_time(opened: Callable[[str], Any], kind: str) -> None:
    """Else all weights would lie in memory in float32 before the first layer runs."""
    _, order = opened(kind)
    waiting = most = 0
    for op in order:
        waiting += {"Cast": 1, "FusedMatMul": -1}.get(op, 0)
        most = max(most, waiting)
    assert order.count("FusedMatMul") > 30 and most <= 3, "looked-up rows or an image's pixels, and two parts"


def test_limits_of_a_comparison_are_those_of_a_dtype_that_was_asked_for(kept: tuple[Path, Any]) -> None:
    """What a checkpoint is rounded to may differ from it."""
    manifest = runtime.load(kept[0]).artifact.manifest
    for dtype, expected in (("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        options_of = msgspec.structs.replace(manifest.build, options={**manifest.build.options, "dtype": dtype})
        assert precision(msgspec.structs.replace(manifest, build=options_of)) == expected


# ---- beside packed weights


class Looked(nn.Module):
    """A table in 16 bits, and a product in 8."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = Table(4096, 512), Linear(512, 2304, bias=False, quant="w8a16")

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.up(self.table(token_ids))


def test_what_is_widened_is_not_written_beside_packed_weights(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    parts = {f"up.{name}": part for name, part in quantize("w8a16", torch.randn(2304, 512, generator=random)).items()}
    values = {"table.weight": torch.randn(4096, 512, generator=random).half(), **parts}
    stored = {n: StoredTensor(str(v.dtype).removeprefix("torch."), tuple(v.shape)) for n, v in values.items()}
    shard = lay_out("weights/all.safetensors", stored)
    write_weight_file(tmp_path, shard, values.__getitem__)
    specs = (
        TensorSpec(name="token_ids", dtype="int32", shape=(1, 2)), TensorSpec(name="y", dtype="float32", shape=(1, 2, 2304))
    )  # fmt: skip
    with torch.device("meta"):
        definition = GraphDef(GraphKey("prefill", 2), Looked(), specs[:1], specs[1:])
    (tmp_path / "graph.onnx").write_bytes(emit(definition, shard.tensors))
    host = HostCache(tmp_path, [definition.spec("graph.onnx")], shard.tensors.values())
    assert host.ensure(lambda: ort._options(pack=True, threads=1))
    assert host.nbytes == sum(each.nbytes for name, each in stored.items() if name != "table.weight")
    sizes = [path.stat().st_size for path in host.folder.glob("prefill.*")]
    assert parts["up.qweight"].numel() < sum(sizes) < stored["table.weight"].nbytes

    def run(path: Path | None) -> np.ndarray:
        assert path is not None
        session = onnxruntime.InferenceSession(path, ort._options(pack=True, threads=1), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"token_ids": np.array([[4095, 7]], np.int32)})[0])

    assert np.array_equal(run(host.path("graph.onnx")), run(tmp_path / "graph.onnx"))


# ---- everything else that reads weights


@pytest.mark.parametrize("settings", [{"tp": 2}, {"pp": 2, "quant": "w8a8+vision"}])
def test_ranks_and_stages(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Certificates are made while it is compiled, of all ranks together."""
    tiny_llava(tmp_path / "checkpoint", dtype=torch.bfloat16)
    manifest = build(options(tmp_path, "float16", **settings)).manifest
    assert TABLE in in_16_bits(manifest)
    assert all(graph.certificate and graph.certificate.passed for graph in manifest.graphs)


def test_what_float16_cannot_hold_is_refused_of_matrices_alone(tmp_path: Path) -> None:
    folder = tiny_llava(tmp_path / "checkpoint").folder
    (file,) = folder.glob("*.safetensors")

    def stored_with_a_large_number_in(ending: str) -> str:
        tensors = load_file(file)
        tensors[next(name for name in tensors if name.endswith(ending))].view(-1)[0] = 1e5
        save_file(tensors, file, {"format": "pt"})
        floats, source = Floats(matrices="float16"), open_source(folder)
        specs = convert(source, read_config(folder), tmp_path / ending, Conversion(prefix="k", floats=floats)).weights
        return specs["text.norm.weight"].dtype

    assert stored_with_a_large_number_in("model.norm.weight") == "float32"
    with pytest.raises(
        WeightsError, match=r"text.embed.weight holds 1e\+05, more than float16 can store; compile with --dtype"
    ):
        stored_with_a_large_number_in("embed_tokens.weight")


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", ["llava_next", "mllama", "qwen_vl"])
def test_every_family(tmp_path: Path, family: str, tp: int) -> None:
    """Certified, and as close to the checkpoint as if it were stored in float32; of one family operator by operator."""
    folder = tmp_path / "checkpoint"
    if family == "qwen_vl":
        shutil.copytree(GOLDEN_QWEN, folder)
    else:
        (tiny_llava_next if family == "llava_next" else tiny_mllama)(folder, dtype=torch.bfloat16)
    images = (1,) if family == "mllama" else None
    buckets = Buckets(prefill=(16,), decode=(1,), images=images, context=384, slots=1)
    manifest = build(replace(options(tmp_path, "auto", tp=tp), buckets=buckets)).manifest
    assert TABLE in in_16_bits(manifest) or family == "qwen_vl"  # whose checkpoint is in float32
    inspect = ["--inspect", "always"] if family == "mllama" else []
    assert main(["compare", str(folder), str(tmp_path / "a"), *inspect]) == 0
