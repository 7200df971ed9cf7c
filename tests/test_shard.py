"""Cuts for tensor parallelism: parts make up the whole, and what ranks compute adds up to what one computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.weights.rules import targets
from staticvl.weights.shard import check_tp, rank_parameters, rank_shape, rank_span, shard_axis
from staticvl.weights.tensors import WeightsError

from .tiny_families import GOLDEN_QWEN, llava_next_model, mllama_model, save


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("shard")
    models = {"llava_next": llava_next_model(), "mllama": mllama_model()}
    found = {name: read_config(save(model, folder / name)) for name, model in models.items()}
    return found | {"qwen_vl": read_config(GOLDEN_QWEN)}


def wide(config: ModelConfig, heads: int = 8, kv_heads: int = 8) -> ModelConfig:
    """The same with sizes that divide by 8."""
    text = replace(config.text, heads=heads, kv_heads=kv_heads, head_dim=4, intermediate_size=24, vocab_size=48)
    return replace(config, text=text)


def part(config: ModelConfig, name: str, tensor: Tensor, tp: int, rank: int) -> Tensor:
    axis = shard_axis(name)
    if axis is None:
        return tensor
    first, stop = rank_span(config, name, tuple(tensor.shape), tp, rank)
    return tensor.narrow(axis, first, stop - first)


@pytest.mark.parametrize("family", ["llava_next", "mllama", "qwen_vl"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_make_up_the_whole(configs: dict[str, ModelConfig], family: str, tp: int) -> None:
    config = wide(configs[family])
    for name, shape in targets(config).items():
        whole = torch.randn(shape)
        parts = [part(config, name, whole, tp, rank) for rank in range(tp)]
        assert all(tuple(p.shape) == rank_shape(config, name, shape, tp) for p in parts)
        axis = shard_axis(name)
        assert all(p is whole for p in parts) if axis is None else torch.equal(torch.cat(parts, axis), whole), name


def test_what_is_cut(configs: dict[str, ModelConfig]) -> None:
    axes = {name: shard_axis(name) for config in configs.values() for name in targets(config)}
    kinds = {".".join(part for part in name.split(".") if not part.isdigit()): axis for name, axis in axes.items()}
    rows = {f"text.layers.attn.{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")}
    rows |= {
        "text.layers.mlp.gate.weight",
        "text.layers.mlp.up.weight",
        "text.lm_head.weight",
        "cross.k.weight",
        "cross.v.weight",
    }
    assert {kind for kind, axis in kinds.items() if axis == 0} == rows
    assert {kind for kind, axis in kinds.items() if axis == 1} == {"text.layers.attn.o.weight", "text.layers.mlp.down.weight"}
    with pytest.raises(AssertionError, match="cut before quantising"):
        shard_axis("text.layers.0.mlp.down.qweight")


def attend(w: dict[str, Tensor], x: Tensor, head_dim: int) -> Tensor:
    """Attention with as many heads as the weights have; x [T, C] -> [T, C]."""
    q, k, v = (linear(x, w[f"{n}.weight"], w[f"{n}.bias"]).unflatten(-1, (-1, head_dim)).transpose(0, 1) for n in "qkv")
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return linear(mixed.transpose(0, 1).flatten(1), w["o.weight"])


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_ranks_add_up_to_the_whole(configs: dict[str, ModelConfig], tp: int, kv_heads: int) -> None:
    """With heads that are shared by groups of queries, and by ranks where there are fewer of them than ranks."""
    config = wide(configs["qwen_vl"], kv_heads=kv_heads)
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


def test_shared_heads_are_whole_on_every_rank_of_a_group(configs: dict[str, ModelConfig]) -> None:
    config = wide(configs["mllama"], kv_heads=2)
    for name in ("text.layers.0.attn.k.weight", "cross.1.v.weight"):
        spans = [rank_span(config, name, targets(config)[name], 8, rank) for rank in range(8)]
        assert spans == [(0, 4)] * 4 + [(4, 8)] * 4


def test_parameters_of_a_rank_are_those_of_its_parts(configs: dict[str, ModelConfig]) -> None:
    config = wide(configs["mllama"], kv_heads=2)
    for tp in (1, 2, 4, 8):
        parts = [part(config, name, torch.empty(shape, device="meta"), tp, 0) for name, shape in targets(config).items()]
        assert rank_parameters(config, tp) == sum(p.numel() for p in parts)


@pytest.mark.parametrize(
    ("tp", "change", "message"),
    [
        (0, {}, "tensor parallelism 0; expected a number of ranks from 1 on"),
        (3, {}, "8 attention heads do not divide among 3 ranks; choose a number of ranks that divides 8"),
        (
            8,
            {"intermediate_size": 20},
            "20 rows of the MLP do not divide among 8 ranks; choose a number of ranks that divides 20",
        ),
        (8, {"vocab_size": 49}, "49 rows of lm_head do not divide among 8 ranks"),
        (4, {"heads": 12, "kv_heads": 6}, "6 key-value heads neither divide among 4 ranks nor the ranks among them; choose"),
    ],
)
def test_sizes_that_cannot_be_cut(configs: dict[str, ModelConfig], tp: int, change: dict[str, int], message: str) -> None:
    config = wide(configs["llava_next"])
    config = replace(config, text=replace(config.text, **change))
    for call in (check_tp, rank_parameters):
        with pytest.raises(WeightsError, match=message):
            call(config, tp)
    with pytest.raises(WeightsError, match=message):
        rank_shape(config, "text.norm.weight", (64,), tp)


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
    assert rank_shape(config, "text.lm_head.weight", ours["text.lm_head.weight"], 8) == (16032, 8192)
