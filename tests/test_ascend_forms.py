"""Quantised layers in the forms in which artifacts for Ascend store them."""

from __future__ import annotations

from dataclasses import replace
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
from staticvl.model_defs.config import ModelConfig
from staticvl.model_defs.layers import Linear
from staticvl.runtime.backends.ascend.weights import to_offsets
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.weights import ascend_forms, convert
from staticvl.weights.ascend_contents import packed_features, unpacked_features
from staticvl.weights.convert import Conversion
from staticvl.weights.head_padding import head_width
from staticvl.weights.quantize import dequantize
from staticvl.weights.source import open_source
from staticvl.weights.storage import quant_of, stored_targets, uniform
from staticvl.weights.weight_map import targets

from . import merged_models
from .conftest import EMBEDDED
from .merged_models import graphs, model_config
from .need_torchair import skip_without_torchair
from .wide_models import part as rank_part
from .wide_models import write_random

GROUPS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
ANSWER = {"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True}


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.rglob("*.safetensors")) for name, value in load_file(file).items()}


def whole_weights(checkpoint: Path, tp: int, rank: int) -> dict[str, np.ndarray]:
    """The rank's weights in floats, those that are merged one after another."""
    config = model_config("llava")
    read = convert.parameters(open_source(checkpoint), config)
    apart = {name: rank_part(config, name, read(name), tp, rank).numpy() for name in targets(config)}
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


@pytest.mark.parametrize(("quant", "part"), [("w8a16", "mlp.down"), ("w4a16", "attn.qkv")])
def test_artifacts_from_before_still_answer(quant: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers have blocks. Made again, all graphs have certificates."""
    skip_without_torchair()
    buckets = Buckets(prefill=(16,), decode=(1,), context=64, slots=1)
    options = Options(checkpoint=EMBEDDED, out=tmp_path, buckets=buckets, backend="ascend", candidates=0, quant=quant)
    with monkeypatch.context() as patch:
        for module in (ascend_forms, stored_forms):
            patch.setattr(module, "QUANTS", ())
        for module in (ascend_forms, convert, stored_forms):
            patch.setattr(module, "packs_features", lambda *_: False)
        patch.setattr(fingerprint, "code_digests", lambda *_, **__: {"code": "of an earlier version"})
        old = build(options).manifest
    name = f"text.layers.0.{part}.qweight"
    assert len(old.weights[name].shape) == 3
    before = runtime.load(tmp_path, device="sim").generate("Say one word.", **ANSWER)
    made = build(options)
    assert made.converted and len(made.manifest.weights[name].shape) == 2
    assert all(graph.certificate and graph.certificate.worst <= 1e-4 for graph in made.manifest.graphs)
    after = runtime.load(tmp_path, device="sim").generate("Say one word.", **ANSWER)
    assert len(before.token_ids) == len(after.token_ids) == 4
    if quant == "w4a16":  # the same numbers; those of 8 bits are rounded by other scales
        assert before.token_ids == after.token_ids


# --- 4 bits, packed along the out features ------------------------------------------------------------------------------------


def nibbles(rows: np.ndarray) -> np.ndarray:
    """qweight [N, B, block / 2] -> [N, K], 0..15, the low bits first."""
    low_first = np.stack((rows & 15, rows >> 4), -1)
    return low_first.reshape(len(rows), -1)


def check_packed(stem: str, plain: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Number by number, of a layer [N, K] that may be merged."""
    numbers = nibbles(plain[f"{stem}.qweight"].numpy()).astype(np.int64) - 8
    packed = stored[f"{stem}.qweight"].numpy()
    assert packed.dtype == np.int32 and packed.shape == (numbers.shape[1], len(numbers) // 8)
    for place in range(8):
        found = packed.astype(np.int64) >> 4 * place & 15
        assert np.array_equal(np.where(found > 7, found - 16, found), numbers[place::8].T)
    assert torch.equal(stored[f"{stem}.scales"], plain[f"{stem}.scales"].T)


def packed_model() -> ModelConfig:
    """Two blocks of 128 in a row of most layers; down has 192 columns, of which the last block is not full."""
    config = model_config("llava")
    text = replace(config.text, hidden_size=256, intermediate_size=192, heads=8, head_dim=32, kv_heads=2)
    return replace(config, text=text)


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 1)])
def test_4_bits_are_packed_along_the_out_features(tp: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored, and what definitions find in it: the parts that an artifact without the form has."""
    config = packed_model()
    source = open_source(write_random(config, tmp_path / "checkpoint"))
    conversion = Conversion(quant="w4a16", prefix="k", ascend=True, floats=uniform("float16"), tp=tp, rank=rank)
    outs = tmp_path / "plain", tmp_path / "packed"
    with monkeypatch.context() as patch:
        for module in (ascend_forms, convert):
            patch.setattr(module, "packs_features", lambda *_: False)
        plain_weights = convert.convert(source, config, outs[0], conversion).weights
    weights = convert.convert(source, config, outs[1], conversion).weights
    plain, stored = map(contents, outs)
    layers = sorted(name.removesuffix(".qweight") for name in stored if stored[name].dtype == torch.int32)
    assert layers == [f"text.layers.{i}.{each}" for i in (0, 1) for each in ("attn.o", "attn.qkv", "mlp.gate_up")]
    for stem in layers:
        check_packed(stem, plain, stored)
    assert all(torch.equal(stored[name], plain[name]) for name in plain if name.rpartition(".")[0] not in layers)
    for name, defined in stored_targets(config, "w4a16", tp=tp).items():
        shape, width = defined.shape, head_width(config, name)
        packed = map_parameter(outs[1], weights, name, shape, width)
        assert torch.equal(packed, map_parameter(outs[0], plain_weights, name, shape, width)), name
        assert stored_bytes(weights, name, defined.shape) == stored_bytes(plain_weights, name, defined.shape)


def test_zero_points_and_members_of_packed_layers() -> None:
    """Offsets lie as the scales do; a member need not begin where eight numbers do."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, (64, 3, 64), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 256, (64, 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(64, 3, generator=generator)
    packed = packed_features("qweight", numbers)
    expected = to_offsets(zeros, numbers, scales)
    assert torch.equal(to_offsets(zeros, packed, packed_features("scales", scales)), expected.T)
    assert torch.equal(unpacked_features("qweight", packed, (64, 3, 64), 0), numbers)
    assert torch.equal(unpacked_features("qweight", packed, (12, 3, 64), 20), numbers[20:32])


@pytest.mark.parametrize(
    ("kind", "shape", "packs"),
    [
        ("w4a16", (64, 256), True),
        ("w4a16-asym", (4096, 11008), True),
        ("w4a16", (72, 256), False),
        ("w4a16", (64, 256 + 120), False),
        ("w4a16-g32", (64, 256), False),
        ("w8a16", (64, 256), False),
        ("w8a8", (64, 256), False),
        ("none", (64, 256), False),
    ],
)
def test_which_layers_are_packed(kind: str, shape: tuple[int, int], packs: bool) -> None:
    assert ascend_forms.packs_features(kind, shape) == packs


def test_packed_weights_are_taken_as_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not transposed, in groups of 128. The layers of other sizes are transposed as before."""
    skip_without_torchair()
    config = packed_model()
    monkeypatch.setattr(merged_models, "model_config", lambda _family: config)
    (graph,) = (each for each in graphs("llava", "w4a16") if each.kind == "decode")
    parsed = ge_graph.parse(emit(graph, "float16").graph)
    packed = [node for node in parsed.inputs if node.outputs[0].dtype == "int32" and len(node.outputs[0].shape or ()) == 2]
    packed = [node for node in packed if node.outputs[0].shape[0] == 256]
    readers = [each for node in packed for each in parsed.readers(ge_graph.Source(node.name, 0))]
    assert [each.type for each in readers] == ["WeightQuantBatchMatmulV2"] * 3 * config.text.layers
    assert all(each.attributes["antiquant_group_size"] == 128 for each in readers)
    others = [node for node in parsed.nodes if node.type == "WeightQuantBatchMatmulV2" and node not in readers]
    assert len(others) == config.text.layers + 1, "down, and lm_head"
