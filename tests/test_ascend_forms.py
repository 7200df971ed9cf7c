"""Quantised layers in the forms in which artifacts for Ascend store them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from staticvl import runtime
from staticvl.compiler import fingerprint
from staticvl.compiler.ascend_graph import stored_forms
from staticvl.compiler.buckets import Buckets
from staticvl.compiler.build import build
from staticvl.compiler.emit_ascend import emit
from staticvl.compiler.options import Options
from staticvl.compiler.weight_views import map_parameter, stored_bytes
from staticvl.model_defs.layers import Linear
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights import ascend_forms, convert
from staticvl.weights.convert import Conversion
from staticvl.weights.quantize import dequantize
from staticvl.weights.source import open_source
from staticvl.weights.storage import quant_of, stored_targets, uniform
from staticvl.weights.weight_map import targets

from .conftest import EMBEDDED
from .merged_models import graphs, model_config
from .need_torchair import skip_without_torchair
from .wide_models import part, write_random

GROUPS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
ANSWER = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def whole_weights(checkpoint: Path, tp: int, rank: int) -> dict[str, np.ndarray]:
    """The rank's weights in floats, those that are merged one after another."""
    config = model_config("llava")
    read = convert.parameters(open_source(checkpoint), config)
    apart = {name: part(config, name, read(name), tp, rank).numpy() for name in targets(config)}
    for name in list(apart):
        for group, members in GROUPS.items():
            if name.startswith("text.") and name.endswith(f".{members[0]}.weight"):
                stem = name.removesuffix(f"{members[0]}.weight")
                apart[f"{stem}{group}.weight"] = np.concatenate([apart[f"{stem}{each}.weight"] for each in members])
    return apart


def columns_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 bits around 128 and one scale for each row, number by number."""
    scales = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    steps = np.round(weight / np.where(scales > 0, scales, 1)) + 128
    return steps.astype(np.uint8), scales


# --- 8 bits: one scale for each column ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1)])
@pytest.mark.parametrize(("quant", "layers"), [("w8a16", 9), ("w8a8", 1), ("w4a16-g32", 1)])
def test_8_bits_have_one_scale_for_each_column(quant: str, layers: int, tp: int, rank: int, tmp_path: Path) -> None:
    """All layers of the decoder, and of other quantisations lm_head."""
    config, out = model_config("llava"), tmp_path / "out"
    checkpoint = write_random(config, tmp_path / "checkpoint")
    conversion = Conversion(quant=quant, prefix="k", ascend=True, floats=uniform("float16"), tp=tp, rank=rank)
    weights = convert.convert(open_source(checkpoint), config, out, conversion).weights
    stored, floats = contents(out), whole_weights(checkpoint, tp, rank)
    eights = [name for name in stored if name.endswith(".qweight") and stored[name].dtype == torch.uint8]
    eights = [name for name in eights if quant == "w8a16" or "lm_head" in name]
    assert len(eights) == layers, eights
    for name in eights:
        stem = name.removesuffix(".qweight")
        steps, scales = columns_of(floats[f"{stem}.weight"])
        assert np.array_equal(stored[name].numpy(), steps), name
        assert np.array_equal(stored[f"{stem}.scales"].numpy(), scales.astype(np.float16)), name
    check_read_back(out, weights, quant, tp, floats)


def check_read_back(out: Path, weights: dict, quant: str, tp: int, floats: dict[str, np.ndarray]) -> None:
    """Definitions find parts of their own shapes, which stand for the weights."""
    for graph in graphs("llava", quant, ranks=tp):
        for stem, module in graph.module.named_modules():
            if not isinstance(module, Linear) or module.quant == "none":
                continue
            shapes = {key: value.shape for key, value in module.named_parameters(recurse=False)}
            parts = {key: map_parameter(out, weights, f"{stem}.{key}", shape) for key, shape in shapes.items()}
            assert {key: value.shape for key, value in parts.items()} == shapes
            weight = torch.from_numpy(floats[f"{stem}.weight"])
            kind = quant_of(f"{stem}.weight", quant)
            read = dequantize(kind, parts, weight.shape[1])
            # Of 4 bits, +8 steps may have become +7.
            step = weight.abs().amax(1, keepdim=True) * (1.1 / 7 if kind.startswith("w4") else 0.6 / 127)
            assert bool(((read - weight).abs() <= step).all()), stem
            assert stored_bytes(weights, f"{stem}.qweight", shapes["qweight"])


def test_quantised_checkpoints_keep_their_blocks() -> None:
    stored = stored_targets(model_config("llava"), "w8a16+float-head", ascend=True)
    assert len(stored["text.layers.0.attn.qkv.qweight"].shape) == 3


@pytest.mark.parametrize("kind", ["vision", "prefill", "decode"])
def test_products_in_8_bits_have_no_groups(kind: str) -> None:
    """Weight and scales are [K, N] and [1, N], each seen through one transposition."""
    skip_without_torchair()
    (graph,) = (each for each in graphs("llava", "w8a16", heads=16) if each.kind == kind)
    parsed = ge_graph.parse(emit(graph, "float16").graph)
    products = [node for node in parsed.nodes if node.type == "WeightQuantBatchMatmulV2"]
    assert len(products) == (0 if kind == "vision" else 9)
    assert all(node.attributes["antiquant_group_size"] == 0 for node in products)
    inputs = {node.name: node.outputs[0] for node in parsed.inputs}
    shapes = [(node.dtype, len(node.shape or ())) for node in inputs.values() if node.dtype == "int8"]
    assert shapes == [("int8", 2)] * len(products)


@pytest.mark.parametrize("quant", ["w8a16"])
def test_artifacts_from_before_still_answer(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers have blocks. Made again, all graphs have certificates."""
    skip_without_torchair()
    buckets = Buckets(prefill=(16,), decode=(1,), context=64, slots=1)
    options = Options(checkpoint=EMBEDDED, out=tmp_path, buckets=buckets, backend="ascend", candidates=0, quant=quant)
    with monkeypatch.context() as patch:
        for module in (ascend_forms, stored_forms):
            patch.setattr(module, "QUANTS", ())
        patch.setattr(fingerprint, "code_digests", lambda *_, **__: {"code": "of an earlier version"})
        old = build(options).manifest
    name = "text.layers.0.mlp.down.qweight"
    assert len(old.weights[name].shape) == 3
    before = runtime.load(tmp_path, device="sim").generate("Say one word.", **ANSWER)
    made = build(options)
    assert made.converted and len(made.manifest.weights[name].shape) == 2
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in made.manifest.graphs)
    after = runtime.load(tmp_path, device="sim").generate("Say one word.", **ANSWER)
    assert len(before.token_ids) == len(after.token_ids) == 4
