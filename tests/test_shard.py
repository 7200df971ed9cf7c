"""Cuts for tensor parallelism: parts make up the whole, and what ranks compute adds up to what one computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.weights.shard import check_tp, possible_tp, rank_parameters, rank_shape, rank_span, rank_targets, shard_axis
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import targets

from .wide_models import CONFIGS, part, wide_config


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_make_up_the_whole(family: str, tp: int) -> None:
    config = wide_config(family)
    for name, shape in targets(config).items():
        whole = torch.randn(shape)
        parts = [part(config, name, whole, tp, rank) for rank in range(tp)]
        assert all(tuple(p.shape) == rank_shape(config, name, shape, tp) for p in parts)
        axis = shard_axis(config, name)
        if axis is None:
            assert all(p is whole for p in parts), name
            continue
        joined = torch.cat(parts, axis)
        held, filled = joined[: len(whole)], joined[len(whole) :]  # lm_head may end with rows of no token
        assert torch.equal(held, whole) and not filled.any() and (name == "text.lm_head.weight" or not len(filled)), name


def without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


BLOCK = {f"attn.{n}" for n in "qkv"} | {"mlp.up"}
CUT_BY_ROWS = {  # besides text.layers; weights and biases
    "llava": {*(f"vision.layers.{n}" for n in BLOCK), "projector.up"},
    "mllama": {*(f"vision.{w}.{n}" for n in BLOCK for w in ("layers", "global_layers")), "projector", "cross.k", "cross.v"},
    "qwen_vl": {*(f"vision.layers.{n}" for n in BLOCK), "projector", "pool.kv", *(f"pool.attn.{n}" for n in "qkv")},
}
CUT_BY_COLUMNS = {
    "llava": {"vision.layers.attn.o", "vision.layers.mlp.down", "projector.down"},
    "mllama": {*(f"vision.{w}.{n}" for n in ("attn.o", "mlp.down") for w in ("layers", "global_layers")), "vision.positions"},
    "qwen_vl": {"vision.layers.attn.o", "vision.layers.mlp.down", "pool.attn.o"},
}


@pytest.mark.parametrize("family", CUT_BY_ROWS)
def test_what_is_cut(family: str) -> None:
    config = wide_config(family)
    axes = {without_numbers(name): shard_axis(config, name) for name in targets(config)}
    text = {f"text.layers.{n}" for n in (*BLOCK, "mlp.gate")} | {"text.lm_head"}
    rows, columns = (
        {kind for kind, axis in axes.items() if axis == 0},
        {kind for kind, axis in axes.items() if axis == 1},
    )
    assert {kind.rpartition(".")[0] for kind in rows} == text | CUT_BY_ROWS[family]
    expected = {"text.layers.attn.o", "text.layers.mlp.down", "text.embed"} | CUT_BY_COLUMNS[family]
    assert columns == {f"{name}.weight" for name in expected}
    # A bias goes with the rows of its weight, and is whole where products are summed.
    biases = {kind for kind in axes if kind.endswith(".bias")}
    assert {kind for kind in biases if axes[kind] == 0} == {kind for kind in biases if kind.replace("bias", "weight") in rows}


def test_a_cut_comes_before_quantising() -> None:
    with pytest.raises(AssertionError, match="shard before quantising"):
        shard_axis(wide_config("llava"), "text.layers.0.mlp.down.qweight")


def attend(w: dict[str, Tensor], x: Tensor, head_dim: int) -> Tensor:
    """Attention with as many heads as the weights have; x [T, C] -> [T, C]."""
    q, k, v = (linear(x, w[f"{n}.weight"], w[f"{n}.bias"]).unflatten(-1, (-1, head_dim)).transpose(0, 1) for n in "qkv")
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return linear(mixed.transpose(0, 1).flatten(1), w["o.weight"])


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_add_up_to_the_whole(tp: int, kv_heads: int) -> None:
    """With heads that are shared by groups of queries, and by ranks where there are fewer of them than ranks."""
    config = wide_config("qwen_vl")
    config = replace(config, text=replace(config.text, kv_heads=kv_heads))
    torch.manual_seed(0)
    shapes = {name: shape for name, shape in targets(config).items() if name.startswith("text.layers.0.")}
    for kind in ("weight", "bias"):  # Qwen's own k and v have as many rows as q
        rows = kv_heads * config.text.head_dim
        shapes |= {f"text.layers.0.attn.{n}.{kind}": (rows, *shapes[f"text.layers.0.attn.{n}.{kind}"][1:]) for n in "kv"}
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(5, config.text.hidden_size, dtype=torch.float64)

    def weights(prefix: str, rank: int | None) -> dict[str, Tensor]:
        taken = {name: w for name, w in whole.items() if name.startswith(prefix)}
        cut = taken if rank is None else {name: part(config, name, w, tp, rank) for name, w in taken.items()}
        return {name.removeprefix(prefix): w for name, w in cut.items()}

    def mlp(w: dict[str, Tensor]) -> Tensor:
        return linear(silu(linear(x, w["gate.weight"])) * linear(x, w["up.weight"]), w["down.weight"])

    attention, gated = "text.layers.0.attn.", "text.layers.0.mlp."
    dim = config.text.head_dim
    torch.testing.assert_close(
        sum(attend(weights(attention, rank), x, dim) for rank in range(tp)), attend(weights(attention, None), x, dim)
    )
    torch.testing.assert_close(sum(mlp(weights(gated, rank)) for rank in range(tp)), mlp(weights(gated, None)))


def test_shared_heads_are_whole_on_every_rank_of_a_group() -> None:
    config = wide_config("mllama", kv_heads=2)
    for name in ("text.layers.0.attn.k.weight", "cross.1.v.weight"):
        spans = [rank_span(config, name, targets(config)[name], 8, rank) for rank in range(8)]
        assert spans == [(0, 8)] * 4 + [(8, 16)] * 4


def test_parameters_of_a_rank_are_those_of_its_parts() -> None:
    config = wide_config("mllama", kv_heads=2)
    for tp in (1, 2, 4, 8):
        parts = [part(config, name, torch.empty(shape, device="meta"), tp, 0) for name, shape in targets(config).items()]
        assert rank_parameters(config, tp) == sum(p.numel() for p in parts)


@pytest.mark.parametrize("tp", [2, 3, 8])
def test_a_vocabulary_need_not_divide(tp: int) -> None:
    config = wide_config("llava")
    config = replace(
        config, text=replace(config.text, vocab_size=9, heads=24, kv_heads=24, hidden_size=192, intermediate_size=96)
    )
    config = replace(config, vision=replace(config.vision, heads=24, hidden_size=24, intermediate_size=48))
    name, shape = "text.lm_head.weight", (9, 192)
    rows = [row for rank in range(tp) for row in range(*rank_span(config, name, shape, tp, rank))]
    assert rows == list(range(9)) and rank_shape(config, name, shape, tp) == (-(-9 // tp), 192)


DO = "; this model can be sharded over these numbers of ranks: "


@pytest.mark.parametrize(
    ("tp", "change", "message"),
    [
        (0, {}, "tensor parallelism 0; expected a number of ranks from 1 on"),
        (3, {}, f"8 attention heads do not divide among 3 ranks{DO}1, 2, 4, 8$"),
        (8, {"intermediate_size": 20}, f"20 rows of the MLP do not divide among 8 ranks{DO}1, 2, 4$"),
        (4, {"hidden_size": 50}, f"50 columns of the embedding table do not divide among 4 ranks{DO}1, 2$"),
        (4, {"heads": 12, "kv_heads": 6}, f"6 key-value heads neither divide among 4 ranks nor the ranks among them{DO}1, 2$"),
    ],
)
def test_texts_that_cannot_be_cut(tp: int, change: dict[str, int], message: str) -> None:
    config = wide_config("llava_next")
    check_refused(replace(config, text=replace(config.text, **change)), tp, message)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", {"heads": 4}, f"4 attention heads of the vision tower do not divide among 8 ranks{DO}1, 2, 4$"),
        ("mllama", {"intermediate_size": 54}, f"54 rows of the vision tower's MLP do not divide among 8 ranks{DO}1, 2$"),
        ("qwen_vl", {"resampler_head_dim": 16}, f"4 attention heads of the resampler do not divide among 8 ranks{DO}1, 2, 4$"),
    ],
)
def test_towers_that_cannot_be_cut(family: str, change: dict[str, int], message: str) -> None:
    config = wide_config(family)
    check_refused(replace(config, vision=replace(config.vision, **change)), 8, message)


def check_refused(config: ModelConfig, tp: int, message: str) -> None:
    for call in (check_tp, rank_parameters, rank_targets):
        with pytest.raises(WeightsError, match=message):
            call(config, tp)
    with pytest.raises(WeightsError, match=message):
        rank_shape(config, "text.norm.weight", (64,), tp)


def test_more_ranks_than_key_value_heads() -> None:
    assert possible_tp(wide_config("mllama", kv_heads=2)) == (1, 2, 4, 8)


def test_a_published_size(tmp_path: Path) -> None:
    """Llama-3.2-Vision 90B on 8 ranks: one key-value head each."""
    folder = Path(__file__).parents[2] / "shared" / "published" / "meta-llama--Llama-3.2-90B-Vision-Instruct"
    if not folder.is_dir():
        pytest.skip("the published config files are not here")
    config = read_config(folder)
    ours = targets(config)
    assert rank_shape(config, "text.layers.0.attn.k.weight", ours["text.layers.0.attn.k.weight"], 8) == (128, 8192)
    assert rank_shape(config, "cross.19.v.weight", ours["cross.19.v.weight"], 8) == (128, 8192)
    assert rank_shape(config, "text.layers.3.attn.o.weight", ours["text.layers.3.attn.o.weight"], 8) == (8192, 1024)
    assert rank_shape(config, "text.embed.weight", ours["text.embed.weight"], 8) == (128264, 1024)
    assert rank_shape(config, "vision.layers.31.attn.q.weight", ours["vision.layers.31.attn.q.weight"], 8) == (160, 1280)
    assert rank_shape(config, "vision.positions.weight", ours["vision.positions.weight"], 8) == (9, 1601 * 4 * 160)
    assert rank_shape(config, "projector.weight", ours["projector.weight"], 8) == (1024, 7680)
    assert rank_shape(config, "text.lm_head.weight", ours["text.lm_head.weight"], 8) == (16032, 8192)
