"""Faults seeded on purpose, each found and named by the comparison without a hint of where to look."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from staticvl.model_defs.decoder import CrossAttention, Mlp
from staticvl.runtime.artifact import ModelInfo, read_manifest
from staticvl.runtime.engine.feeds import Feeds
from staticvl.runtime.processor import images
from staticvl.runtime.rope import rope_tables
from staticvl.tools.comparing import taps
from staticvl.tools.comparing.findings import Finding
from staticvl.tools.comparing.result import ComparisonResult
from staticvl.tools.comparing.sides import Side

from . import seeded
from .comparisons import check_healthy, compared, compiled, reference_of, samples_of
from .seeded import Model, bypass, constant, copied, insert, made, nodes, weight, with_facts, with_graphs

Pair = tuple[Side, Path]


def pair(family: str, folder: Path, **options) -> Iterator[Pair]:
    artifact = compiled(family, folder / "artifact", **options)
    reference = reference_of(family, artifact)
    yield reference, artifact
    reference.close()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from pair("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from pair("mllama", tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from pair("qwen_vl", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def by_transformers(mllama: Pair) -> Iterator[Side]:
    reference = reference_of("mllama", mllama[1], by="transformers")
    yield reference
    reference.close()


def fault(result: ComparisonResult) -> Finding:
    assert not result.passed
    assert result.first is not None, result.broken
    return result.first


def is_prefill(name: str) -> bool:
    return name.startswith("prefill")


@pytest.mark.parametrize("family", ["llava", pytest.param("mllama", marks=pytest.mark.slow), "qwen"])
def test_healthy_artifacts_raise_no_alarm(family: str, request: pytest.FixtureRequest) -> None:
    check_healthy(*request.getfixturevalue(family), {"qwen": "qwen_vl"}.get(family, family))


# --- graphs ------------------------------------------------------------------------------------------------------------


def test_wrong_rotary_base_in_one_layer(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava
    rope, width = reference.info.rope, read_manifest(artifact).cache.head_dim

    def edit(model: Model) -> None:
        (q, k) = nodes(model, "text.layers.2.attn", "RotaryEmbedding")
        wrong = rope_tables(msgspec.structs.replace(rope, theta=rope.theta * 3), width, 256)
        tokens = next(each for each in model.graph.input if each.name == "token_ids").type.tensor_type.shape.dim[1].dim_value
        insert(model, q, made("Add", ["lengths", constant(model, "places", np.arange(tokens, dtype=np.int32))], "at"))
        for i, table in enumerate(wrong):
            half = constant(model, f"table{i}", np.ascontiguousarray(table[:, : table.shape[1] // 2], np.float32))
            insert(model, q, made("Gather", [half, "at"], f"rows{i}"))
            insert(model, q, made("Unsqueeze", [f"rows{i}", constant(model, f"zero{i}", np.array([0]))], f"wrong{i}"))
            for node in (q, k):
                node.input[1 + i] = f"wrong{i}"

    side = with_graphs(copied(artifact, tmp_path / "broken"), is_prefill, edit)
    found = fault(compared(reference, side, samples_of("llava")))
    assert (found.stage, found.where) == ("graph", "text.layers.2.attn rope")
    assert found.graph.startswith("prefill-")


def test_gate_and_up_swapped_in_a_graph(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava

    def edit(model: Model) -> None:
        gate, up = (next(nodes(model, f"text.layers.1.mlp.{name}", "FusedMatMul")) for name in ("gate", "up"))
        gate.input[1], up.input[1] = up.input[1], gate.input[1]

    side = with_graphs(copied(artifact, tmp_path / "broken"), lambda name: name == "decode-2", edit)
    result = compared(reference, side, samples_of("llava"))
    assert (fault(result).stage, fault(result).where, fault(result).graph) == (
        "graph",
        "text.layers.1.mlp.gate linear",
        "decode-2",
    )
    assert "only decode-2 is at fault, of 5 graphs" in result.scope


def test_mask_off_by_one_at_the_edge_of_a_bucket(llava: Pair, tmp_path: Path) -> None:
    """The last token of a full chunk no longer sees the first; nothing shorter is wrong."""
    reference, artifact = llava

    def edit(model: Model) -> None:
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                node.attribute.append(seeded.helper.make_attribute("local_window_size", 31))

    side = with_graphs(copied(artifact, tmp_path / "broken"), lambda name: name == "prefill-32", edit)
    result = compared(reference, side, samples_of("llava")[:1])
    assert (fault(result).stage, fault(result).graph) == ("graph", "prefill-32")
    assert fault(result).where == "text.layers.0.attn cached_attention"
    assert "only prefill-32 is at fault, of 5 graphs" in result.scope
    assert "prefill-32 is wrong only at full, 2 x full (2 of 5 cases)" in result.scope


def test_keys_written_one_row_late(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava

    def edit(model: Model) -> None:
        (node,) = nodes(model, "text.layers.1.attn", "GroupQueryAttention")
        insert(model, node, made("Add", [node.input[5], constant(model, "one", np.array([1], np.int32))], "late"))
        insert(model, node, made("Add", [node.input[6], constant(model, "unit", np.array(1, np.int32))], "later"))
        node.input[5], node.input[6] = "late", "later"

    side = with_graphs(copied(artifact, tmp_path / "broken"), is_prefill, edit)
    found = fault(compared(reference, side, samples_of("llava")))
    assert found.where == "text.layers.1.attn cached_attention (keys written)"
    assert "rows lie 1 late" in found.text


def test_pixels_normalised_wrongly(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava

    def edit(model: Model) -> None:
        shift = next(each for each in model.graph.initializer if each.name == "pixels.shift")
        value = seeded.numpy_helper.to_array(shift) * 0.5
        shift.CopyFrom(seeded.numpy_helper.from_array(value, "pixels.shift"))

    side = with_graphs(copied(artifact, tmp_path / "broken"), lambda name: name.startswith("vision"), edit)
    result = compared(reference, side, samples_of("llava"))
    assert (fault(result).where, fault(result).graph) == ("pixels aten.add.Tensor", "vision-1")
    assert "only vision-1 is at fault, of 5 graphs" in result.scope


@pytest.mark.slow
def test_missing_norm_of_queries(mllama: Pair, tmp_path: Path) -> None:
    reference, artifact = mllama

    def edit(model: Model) -> None:
        (norm,) = nodes(model, "text.layers.1.attn.q_norm", "SimplifiedLayerNormalization")
        bypass(model, norm)

    side = with_graphs(copied(artifact, tmp_path / "broken"), lambda name: name == "prefill-16-images-1", edit)
    found = fault(compared(reference, side, samples_of("mllama")))
    assert found.where == "text.layers.1.attn.q_norm rms_norm"
    assert "the compiled graph has no such operator" in found.text


def test_tiles_taken_for_padding(mllama: Pair, tmp_path: Path) -> None:
    """Only images of more than two tiles are wrong."""
    reference, artifact = mllama

    def edit(model: Model) -> None:
        (node,) = nodes(model, "vision", "GreaterOrEqual")
        insert(model, node, made("Min", ["tile_count", constant(model, "two", np.array([2], np.int32))], "few"))
        node.input[1] = "few"

    side = with_graphs(copied(artifact, tmp_path / "broken"), lambda name: name.startswith("vision"), edit)
    result = compared(reference, side, samples_of("mllama"))
    assert fault(result).where == "vision tile_padding"
    assert "vision-4 is wrong only at 3 tiles, 4 tiles (2 of 4 cases)" in result.scope


def test_logn_left_out(qwen: Pair, tmp_path: Path) -> None:
    reference, artifact = qwen

    def edit(model: Model) -> None:
        (scaled,) = (node for node in nodes(model, "text.layers.1.attn", "Mul") if "query_scale" in node.input)
        bypass(model, scaled)

    side = with_graphs(copied(artifact, tmp_path / "broken"), is_prefill, edit)
    found = fault(compared(reference, side, samples_of("qwen_vl")))
    assert found.where == "text.layers.1.attn aten.mul.Tensor"


# --- weights and settings ----------------------------------------------------------------------------------------------


def test_gate_and_up_swapped_in_the_weights(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava
    side = copied(artifact, tmp_path / "broken")
    gate, up = (weight(side, f"text.layers.1.mlp.{name}.weight") for name in ("gate", "up"))
    gate[...], up[...] = up.copy(), gate.copy()
    gate.flush(), up.flush()
    result = compared(reference, side, samples_of("llava"), with_edges=False)
    assert [each.where for each in result.findings] == [f"text.layers.1.mlp.{name}.weight" for name in ("gate", "up")]
    assert "holds the reference's text.layers.1.mlp.up.weight" in fault(result).text


@pytest.mark.parametrize(
    ("quant", "bits"),
    [pytest.param("w8a16", 8, marks=pytest.mark.slow), pytest.param("w8a8", 8, marks=pytest.mark.slow), ("w4a16-g32", 4)],
)
def test_scale_of_one_layer_doubled(tmp_path: Path, quant: str, bits: int) -> None:
    side = compiled("qwen_vl", tmp_path / "artifact", quant=quant)
    reference = reference_of("qwen_vl", side)
    check_healthy(reference, side, "qwen_vl")
    scales = weight(side, "text.layers.1.mlp.down.scales")
    scales *= 2
    scales.flush()
    result = compared(reference, side, samples_of("qwen_vl")[:1], with_edges=False)
    reference.close()
    assert [each.where for each in result.findings] == ["text.layers.1.mlp.down.weight"]
    assert re.search(r"it is (2|1\.9\d*|2\.0\d*) times the reference's", fault(result).text)  # 4 bits are a little off
    assert f"only weights that are stored in {bits} bits are at fault" in result.scope


@pytest.mark.slow
def test_shard_of_one_rank_shifted(tmp_path: Path) -> None:
    side = compiled("llava", tmp_path / "artifact", tp=2, candidates=6)
    reference = reference_of("llava", side)
    samples = samples_of("llava")[1:]
    check_healthy(reference, side, "llava")
    whole = reference.manifest is None and np.concatenate(
        [weight(side, "text.layers.2.mlp.up.weight", rank) for rank in range(2)]
    )
    part = weight(side, "text.layers.2.mlp.up.weight", 1)
    part[...] = whole[len(part) - 3 : 2 * len(part) - 3]
    part.flush()
    result = compared(reference, side, samples, with_edges=False)
    reference.close()
    assert [(each.where, each.rank) for each in result.findings] == [("text.layers.2.mlp.up.weight", 1)]
    assert "its rows lie 3 too late" in fault(result).text
    assert "only rank 1 of 2 is at fault" in result.scope


def test_wrong_rotary_base_of_the_model(llava: Pair, tmp_path: Path) -> None:
    reference, artifact = llava

    def change(info: ModelInfo) -> ModelInfo:
        return msgspec.structs.replace(info, rope=msgspec.structs.replace(info.rope, theta=5e5))

    side = with_facts(copied(artifact, tmp_path / "broken"), change)
    result = compared(reference, side, samples_of("llava")[:1], with_edges=False)
    assert (fault(result).stage, fault(result).where) == ("settings", "rope.theta")


# --- the host, and what only transformers can tell ---------------------------------------------------------------------


def test_tiles_in_the_wrong_order(mllama: Pair, by_transformers: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    _, side = mllama
    right = images._cut

    def by_columns(image, corner, grid, tile):
        tiles = right(image, corner, grid, tile)
        return tiles.reshape(*grid, *tiles.shape[1:]).swapaxes(0, 1).reshape(tiles.shape)

    monkeypatch.setattr(images, "_cut", by_columns)
    found = fault(compared(by_transformers, side, samples_of("mllama"), with_edges=False))
    assert (found.stage, found.where) == ("inputs", "pixels")
    assert "the reference's tiles in the order 0, 2, 1, 3" in found.text


def test_norm_missing_in_the_definition(mllama: Pair, by_transformers: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate cannot tell: the graphs are what their definition says."""

    def forward(self: CrossAttention, x, keys, values, mask):
        return self.o(torch.ops.staticvl.cross_attention(self.q(x), list(keys), list(values), mask, self.heads))

    monkeypatch.setattr(CrossAttention, "forward", forward)
    taps.traced.cache_clear()
    candidate = reference_of("mllama", mllama[1])
    found = fault(compared(by_transformers, candidate, samples_of("mllama")))
    candidate.close()
    taps.traced.cache_clear()
    assert (found.stage, found.where) == ("definition", "text.layers.1.attn.q_norm")
    assert "transformers has it, the definition has not" in found.text


def test_fault_in_the_last_layer_of_the_definition(llava: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its attention that layer has one token of a chunk, where transformers' modules have all."""

    def forward(self: Mlp, x):
        gate, up = (self.gate, self.up) if x.dim() == 3 else (self.up, self.gate)
        return self.down(torch.ops.staticvl.silu_mul(gate(x), up(x)))

    monkeypatch.setattr(Mlp, "forward", forward)
    taps.traced.cache_clear()
    candidate, reference = reference_of("llava", llava[1]), reference_of("llava", llava[1], by="transformers")
    found = fault(compared(reference, candidate, samples_of("llava")[:1], with_edges=False))
    for side in (candidate, reference):
        side.close()
    taps.traced.cache_clear()
    assert (found.stage, found.where) == ("definition", "text.layers.3.mlp.down")


def test_steps_fed_one_row_late(llava: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artifact = llava
    reference = reference_of("llava", artifact, by="transformers")
    right = Feeds._decode

    def late(self: Feeds, feed, step, cache) -> None:
        right(self, feed, step, cache)
        feed["lengths"] += 1

    monkeypatch.setattr(Feeds, "_decode", late)
    found = fault(compared(reference, artifact, samples_of("llava")[:1], with_edges=False))
    reference.close()
    assert (found.stage, found.where, found.graph) == ("feeds", "lengths", "decode-1")
    assert "lengths 14 after 13 tokens, where 13 is right" in found.text
