"""Compiled quantised checkpoints against transformers with the weights that they stand for, in float32, logits and tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from staticvl import runtime
from staticvl.compiler import emit_onnx
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import read_manifest

from .checkpoints import tiny_llava
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .need_torchair import skip_without_torchair
from .packings import FORMS, Form, pack_checkpoint
from .parity import Case, check, generated, noise_image, ours

SIZES = {"hidden": 96, "heads": 6, "kv_heads": 2, "intermediate": 128, "layers": 2, "vision_layers": 2}
CROSS = {"cross_layers": (1,), "taps": (0,), "global_layers": 1}
BUCKETS = Buckets(prefill=(16,), decode=(1,), context=320, slots=1)
NEW_TOKENS = 8
TINY: dict[str, Callable[..., Any]] = {"llava": tiny_llava, "llava_next": tiny_llava_next, "mllama": tiny_mllama}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that leave activations as they are, as certificates check them: everything else can be compared closely."""
    emit = emit_onnx.emit
    monkeypatch.setattr(emit_onnx, "emit", lambda *arguments, exact: emit(*arguments, exact=True))


def packed(family: str, form: Form, folder: Path, **settings: Any) -> tuple[Any, Path]:
    """A transformers model with the weights that a packed checkpoint stands for, and the checkpoint."""
    sizes = SIZES | (CROSS if family == "mllama" else {"head_dim": 16})
    tiny = TINY[family](folder, names="new", **sizes | settings)
    parameters = dict(tiny.model.named_parameters())
    for name, value in pack_checkpoint(folder, form).items():
        assert (parameters[name] - value).abs().max() > 1e-4
        parameters[name].data.copy_(value)
    return tiny.model, folder


def question_case(family: str) -> Case:
    if family == "mllama":
        return Case("<|begin_of_text|><|image|>What is in the picture?", [noise_image((56, 20))])
    return Case("USER: <image>\nWhat colour is the circle? ASSISTANT:", [noise_image((60, 41))])


def hf_inputs(family: str, folder: Path, case: Case) -> dict[str, torch.Tensor]:
    more = {"add_special_tokens": False} if family == "mllama" else {}
    processor = AutoProcessor.from_pretrained(folder)
    return dict(processor(images=case.images, text=case.prompt, return_tensors="pt", **more))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "form", "quant"),
    [
        ("llava", "awq", "w4a16-g32-asym"),
        ("llava_next", "gptq-8-asym", "w8a16-g32-asym"),
        ("mllama", "w8a8", "w8a8"),
        pytest.param("mllama", "w4a16", "w4a16-g32", marks=pytest.mark.slow),
    ],
)
def test_packed_checkpoints_equal_transformers(family: str, form: str, quant: str, tmp_path: Path) -> None:
    model, folder = packed(family, FORMS[form], tmp_path / "checkpoint")
    buckets = Buckets(prefill=(16,), decode=(1,), context=320, slots=1, images=(1,) if family == "mllama" else None)
    build(Options(checkpoint=folder, out=tmp_path / "artifact", buckets=buckets))
    manifest = read_manifest(tmp_path / "artifact")
    assert manifest.quant == f"{quant}+float-head" and "quant" not in manifest.build.options
    stored = {name.rpartition(".")[0]: spec.dtype for name, spec in manifest.weights.items() if name.endswith(".qweight")}
    assert set(stored.values()) == {"int8" if quant == "w8a8" else "uint8"}
    assert all(name.startswith("text.layers.") for name in stored)
    case = question_case(family)
    expected = generated(model, hf_inputs(family, folder, case), NEW_TOKENS)
    check(ours(runtime.load(tmp_path / "artifact"), case, NEW_TOKENS), expected, form)


def test_what_an_artifact_rounds_of_its_own(tmp_path: Path) -> None:
    """As it is used: certified but for the rounding of activations, which is stated; made again from the same settings, nothing
    is done again, and other settings of the same tensors are other weights."""
    _, folder = packed("llava", FORMS["gptq-asym"], tmp_path / "checkpoint", layers=1)
    options = Options(checkpoint=folder, out=tmp_path / "artifact", buckets=BUCKETS)
    manifest = build(options).manifest
    for graph in manifest.graphs:
        assert graph.certificate is not None and graph.certificate.worst <= 1e-4
        assert graph.kind == "vision" or 0 < (graph.certificate.rounding or 0) < 0.2
    again = build(options)
    assert (again.converted, again.traced) == (False, ())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    other = build(options)
    assert other.converted and other.traced


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"backend": "ascend"}, {"tp": 2}, {"pp": 2}], ids=["ascend", "tp", "pp"])
@pytest.mark.parametrize("form", ["awq", "gptq-8-asym", "w8a8"])
def test_wherever_it_runs_it_is_certified(form: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The simulator takes offsets for zero points; ranks and stages hold parts of what was packed."""
    if "backend" in settings:
        skip_without_torchair()
    _, folder = packed("llava", FORMS[form], tmp_path / "checkpoint", hidden=128, heads=8)
    manifest = build(Options(checkpoint=folder, out=tmp_path / "artifact", buckets=BUCKETS, **settings)).manifest
    for graph in (graph for stage in range(manifest.pp) for graph in manifest.of_stage(stage).graphs):
        assert graph.certificate is not None and graph.certificate.worst <= 1e-4, graph.name
    if manifest.ranks > 1:
        return
    out = ours(runtime.load(tmp_path / "artifact", device="sim"), question_case("llava"), NEW_TOKENS)
    assert len(out.token_ids) == NEW_TOKENS


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("form", ["w4a16", "w4a16-asym"])
def test_transformers_reads_the_same_checkpoint(form: str, tmp_path: Path) -> None:
    """The very files, opened by transformers with compressed-tensors, which expands them in the type of the scales."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig, LlavaForConditionalGeneration

    _, folder = packed("llava", replace(FORMS[form], scales="float32"), tmp_path / "checkpoint")
    build(Options(checkpoint=folder, out=tmp_path / "artifact", buckets=BUCKETS))
    settings = CompressedTensorsConfig(run_compressed=False)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    case = question_case("llava")
    expected = generated(model, hf_inputs("llava", folder, case), NEW_TOKENS)
    check(ours(runtime.load(tmp_path / "artifact"), case, NEW_TOKENS), expected, form)
