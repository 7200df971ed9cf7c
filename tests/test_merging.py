"""Linear layers with the same input are stored as one, and found again under their own names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from staticvl.compiler.weight_views import map_parameter, stored_bytes
from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.tools.comparing.weights import RankWeights
from staticvl.weights import ascend_forms, merged_tensors, merging, writer
from staticvl.weights import convert as weight_files
from staticvl.weights.calibrated_layers import CalibratedLayers
from staticvl.weights.convert import Conversion, Converted, convert
from staticvl.weights.head_padding import head_width
from staticvl.weights.merging import members_of, merged_name
from staticvl.weights.packing.settings import read_packing
from staticvl.weights.packing.source import open_packed
from staticvl.weights.quantize import quantize
from staticvl.weights.source import Source, open_source
from staticvl.weights.storage import QUANTS, quant_of, stored_targets, uniform
from staticvl.weights.weight_map import targets

from .checkpoints import tiny_llava
from .merged_models import FAMILIES, graphs, model_config
from .packings import FORMS, pack_checkpoint
from .wide_models import write_random

# Every quantisation, each with the next family; all pairs are slow.
every_quant = pytest.mark.parametrize(
    ("family", "quant"),
    [
        pytest.param(family, quant, marks=[] if family == FAMILIES[place % len(FAMILIES)] else pytest.mark.slow)
        for place, quant in enumerate(QUANTS)
        for family in FAMILIES
    ],
)
GROUPS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {family: write_random(model_config(family), folder) for family, folder in folders.items()}


def contents(out: Path, converted: Converted) -> dict[str, Tensor]:
    """The stored tensors, read by another reader."""
    return {name: tensor for file in converted.files for name, tensor in load_file(out / file).items()}


def stored(source: Source, config: ModelConfig, out: Path, **options: Any) -> tuple[dict[str, Tensor], int]:
    """What a conversion stores, and the bytes of its files."""
    conversion = Conversion(**{"prefix": "k", "shard_bytes": 100_000, "floats": uniform("float16")} | options)
    converted = convert(source, config, out, conversion)
    return contents(out, converted), sum(file.nbytes for file in converted.files.values())


def joined(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are to be merged, written out: by rows, those of whole-number products [K, N] by columns."""
    merged = dict(apart)
    for name in apart:
        layer, _, part = name.rpartition(".")
        for group, members in GROUPS.items():
            names = [f"{layer.removesuffix(members[0])}{each}.{part}" for each in members]
            if name == names[0] and not name.startswith("pool.") and all(each in apart for each in names):
                values = [merged.pop(each) for each in names]
                whole_numbers = part == "qweight" and values[0].dtype == torch.int8
                merged[f"{layer.removesuffix(members[0])}{group}.{part}"] = torch.cat(values, 1 if whole_numbers else 0)
    return merged


@contextlib.contextmanager
def nothing_merged() -> Iterator[None]:
    """Artifacts for Ascend as they would be with every layer by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "complete_groups", lambda _names: {})
        yield


def check_merged(source: Source, config: ModelConfig, out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (ascend_forms, weight_files):  # a form that depends on the sizes of what is merged
            patch.setattr(module, "packs_features", lambda *_: False)
        with nothing_merged():
            apart, bytes_apart = stored(source, config, out / "apart", ascend=True, **options)
        merged, bytes_merged = stored(source, config, out / "merged", ascend=True, **options)
    expected = joined(apart)
    assert len(expected) < len(apart) and merged.keys() == expected.keys()
    assert all(merged[name].dtype == value.dtype and torch.equal(merged[name], value) for name, value in expected.items())
    assert bytes_merged <= bytes_apart * 1.01


# --- Weights ----------------------------------------------------------------------------------------------------------------


@every_quant
def test_a_merged_tensor_is_its_members_one_after_another(
    checkpoints: dict[str, Path], family: str, quant: str, tmp_path: Path
) -> None:
    """Of the whole model and of every rank; heads of a rank stay together since members are sharded first."""
    source, config = open_source(checkpoints[family]), model_config(family)
    check_merged(source, config, tmp_path / "whole", quant=quant)
    for rank in range(4):
        check_merged(source, config, tmp_path / str(rank), quant=quant, tp=4, rank=rank)


def test_what_is_merged(checkpoints: dict[str, Path]) -> None:
    """q, k, v and gate, up of all layers that have them; a layer that attends to images has q alone."""
    names = stored_targets(model_config("mllama"), "none", ascend=True)
    text = [sorted(name for name in names if name.startswith(f"text.layers.{i}.attn.")) for i in (0, 1)]
    assert text[0] == ["text.layers.0.attn.o.weight", "text.layers.0.attn.qkv.weight"]
    assert text[1] == [f"text.layers.1.attn.{each}.weight" for each in ("o", "q", "q_norm")]
    for name in ("text.layers.1.mlp.gate_up", "vision.layers.0.attn.qkv", "vision.global_layers.0.attn.qkv"):
        assert f"{name}.weight" in names
    assert "vision.layers.0.mlp.up.weight" in names and "cross.0.k.weight" in names
    qwen = stored_targets(model_config("qwen_vl"), "none", ascend=True)
    assert qwen["text.layers.0.attn.qkv.bias"].shape == (3 * 64,) and "pool.attn.q.weight" in qwen


def test_layers_of_a_stage(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, config = open_source(checkpoints["llava"]), model_config("llava")
    for stage in range(2):
        check_merged(source, config.of_stage(stage, 2), tmp_path / str(stage), quant="w8a16")


@pytest.mark.parametrize("form", ["awq", "gptq-8-asym", "gptq-row", "w4a16-asym", "w8a8"])
def test_packed_checkpoints(form: str, tmp_path: Path) -> None:
    """Zero points are merged too."""
    sizes = {"hidden": 128, "heads": 8, "kv_heads": 2, "intermediate": 128, "layers": 1, "vision_layers": 2}
    folder = tiny_llava(tmp_path / "checkpoint", names="new", **sizes).folder
    pack_checkpoint(folder, FORMS[form])
    packing = read_packing(folder)
    assert packing is not None
    config = read_config(folder)
    source = open_packed(open_source(folder), packing, config)
    for rank in range(2):
        check_merged(source, config, tmp_path / f"{rank}", quant=f"{packing.quant}", tp=2, rank=rank)


def test_calibrated_layers_are_merged_as_they_were_calibrated(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config, quant = model_config("llava"), "w4a16"
    torch.manual_seed(0)
    layer = {}
    for name, shape in targets(config).items():
        if name.startswith("text.layers.0."):
            parts = (
                quantize(kind, torch.randn(shape)) if (kind := quant_of(name, quant)) != "none" else {"": torch.randn(shape)}
            )
            stem = name.removeprefix("text.layers.0.")
            layer |= {stem if not part else stem.replace("weight", part): value for part, value in parts.items()}
    source, found = open_source(checkpoints["llava"]), {}
    for merged in (False, True):
        out = tmp_path / str(merged)
        store = CalibratedLayers(out, "k")
        store.write("text.layers.0", [layer])
        conversion = Conversion(quant=quant, prefix="k", ascend=True)
        with contextlib.nullcontext() if merged else nothing_merged():
            found[merged] = contents(out, convert(source, config, out, conversion, calibrated=store))
    expected = joined(found[False])
    assert torch.equal(expected["text.layers.0.attn.qkv.qweight"][:64], layer["attn.q.qweight"])
    assert all(torch.equal(found[True][name], value) for name, value in expected.items())


def test_a_resumed_conversion_ends_like_an_uninterrupted_one(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = open_source(checkpoints["qwen_vl"]), model_config("qwen_vl")
    expected, _ = stored(source, config, tmp_path / "whole", ascend=True, quant="w8a8")
    write, written = writer.write_weight_file, []

    def breaking(*args: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*args))
        return written[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("staticvl.weights.convert.write_weight_file", breaking)
        stored(source, config, tmp_path / "broken", ascend=True, quant="w8a8")
    found, _ = stored(source, config, tmp_path / "broken", ascend=True, quant="w8a8")
    assert len(written) == 2 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_members_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the merged tensor no more than one of them is in memory."""
    alive: list[str] = []

    class Member(dict):
        def __init__(self, name: str) -> None:
            super().__init__({name: torch.full((2, 3), float(len(alive)))})
            alive.append(name)
            assert len(alive) == 1

        def __del__(self) -> None:
            alive.pop()

    name = "text.layers.0.attn.qkv.weight"
    parts = {name: stored_targets(model_config("llava"), "none", ascend=True)[name]}
    parts[name] = replace(parts[name], shape=(6, 3))
    assert merged_tensors.concatenated(parts, members_of(name), Member)[name].shape == (6, 3)


# --- Members by their own names -----------------------------------------------------------------------------------------------


@every_quant
def test_definitions_find_their_parameters_as_views(
    checkpoints: dict[str, Path], family: str, quant: str, tmp_path: Path
) -> None:
    source, config = open_source(checkpoints[family]), model_config(family)
    conversion = Conversion(quant=quant, prefix="k", ascend=True, tp=2, rank=1)
    outs = [tmp_path / name for name in ("apart", "merged")]
    with nothing_merged():
        apart = convert(source, config, outs[0], conversion).weights
    merged = convert(source, config, outs[1], conversion).weights
    seen = 0
    for graph in graphs(family, quant, ranks=2):
        for name, parameter in graph.module.named_parameters():
            if name not in graph.constants:
                head = graph.heads.get(name, 0)
                expected = map_parameter(outs[0], apart, name, parameter.shape, head)
                found = map_parameter(outs[1], merged, name, parameter.shape, head)
                assert torch.equal(found, expected), name
                assert stored_bytes(merged, name, parameter.shape) == apart[name].nbytes
                seen += name not in merged
                whole = merged[name if name in merged else merged_name(name)]
                filled_up = len(whole.shape) < len(found.shape) and whole.shape[-1] % found.shape[-1]  # a last block
                if not filled_up and not head % 16:
                    assert found.untyped_storage().nbytes() == whole.nbytes, "a view, not a copy"
    assert seen > 8


@pytest.mark.parametrize("quant", ["none", "w8a8+vision", "w4a16-g32"])
def test_compare_reads_the_same_from_both(checkpoints: dict[str, Path], quant: str, tmp_path: Path) -> None:
    """Names, values and shapes are those of the members."""
    source, config = open_source(checkpoints["mllama"]), model_config("mllama")
    shapes = {name: stored.shape for name, stored in stored_targets(config, quant).items()}
    heads = {name: head_width(config, name) for name in shapes}
    sides = []
    for merged in (False, True):
        out = tmp_path / str(merged)
        with contextlib.nullcontext() if merged else nothing_merged():
            weights = convert(source, config, out, Conversion(quant=quant, prefix="k", ascend=True)).weights
        sides.append(RankWeights(out, weights, quant, shapes, heads))
    apart, merged_side = sides
    assert sorted(merged_side.names()) == sorted(apart.names()) == sorted(targets(config))
    for name, shape in targets(config).items():
        columns = shape[-1]
        assert torch.equal(merged_side.read(name, columns), apart.read(name, columns)), name
        assert (merged_side.quantised(name), merged_side.shape(name)) == (apart.quantised(name), apart.shape(name))
