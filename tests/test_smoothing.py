"""Scales that make inputs easier to round: folding them in changes nothing that is computed in floats, and large channels lose
their weight in what is rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from staticvl.model_defs import vit
from staticvl.model_defs.config import read_config
from staticvl.model_defs.decoder import Block, CrossBlock
from staticvl.weights.calibrated_layers import decoder_folds, smoothed, tower_folds
from staticvl.weights.input_statistics import SAMPLED, InputStatistics, StatisticsCollector
from staticvl.weights.quantize import dequantize, quantize
from staticvl.weights.smoothing import Fold, best_scales

from .checkpoints_mllama import tiny_mllama

TOKENS = 24


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x: Tensor) -> InputStatistics:
    gathering = StatisticsCollector(x.shape[-1], moment=True)
    gathering.add(x)
    return gathering.statistics()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory):
    """Layers of both kinds, two query heads to a key-value head, and biases as Qwen-VL has them."""
    config = read_config(tiny_mllama(tmp_path_factory.mktemp("mllama")).folder).text
    assert config.cross_layers and config.heads > config.kv_heads
    return replace(config, qkv_bias=True)


def run(block: nn.Module, x: Tensor, text) -> Tensor:
    if isinstance(block, vit.Block):
        return block(x)
    if isinstance(block, CrossBlock):
        shape = 1, text.kv_heads, 8, text.head_dim
        feed = {"cross_mask": torch.zeros(1, TOKENS, 2), "cross_gate": torch.ones(1, TOKENS, 2)}
        return block(x, feed, [noise(*shape, seed=5)], [noise(*shape, seed=6)])
    angles = noise(1, TOKENS, text.head_dim // 2, seed=4).repeat(1, 1, 2)
    feed = {"rope_cos": angles.cos(), "rope_sin": angles.sin(), "lengths": torch.zeros(1, dtype=torch.int32)}
    cache = torch.zeros(2, 1, text.kv_heads, TOKENS, text.head_dim).unbind(0)
    return block(x, feed, cache)[0]


def block_of(kind: str, text) -> tuple[nn.Module, dict[str, Fold]]:
    if kind == "tower":
        return vit.Block(text.hidden_size, text.heads, 96, eps=1e-5), tower_folds()
    index = next(i for i in range(text.layers) if (i in text.cross_layers) == (kind == "to images"))
    return (Block if kind == "to text" else CrossBlock)(text, "none", 1), decoder_folds(text, index)


@pytest.mark.parametrize(("kind", "count"), [("to text", 4), ("to images", 3), ("tower", 3)])
def test_folding_changes_nothing(kind: str, count: int, text) -> None:
    """To the last bit, since scales are powers of two; every fold has to do its part for it to show."""
    block, places = block_of(kind, text)
    assert len(places) == count
    layer = {name: 0.2 * noise(*value.shape, seed=i) for i, (name, value) in enumerate(block.named_parameters())}
    block.load_state_dict(layer)
    x = noise(1, TOKENS, text.hidden_size, seed=3)
    expected = run(block, x, text)
    for number, fold in enumerate(places.values()):
        channels = layer[fold.producers[0]].shape[0]
        scales = noise(channels, seed=number).round().clamp(-3, 3).exp2()
        changed = fold.apply(layer, scales)
        assert all(not torch.equal(changed[name], layer[name]) for name in (*fold.producers, *fold.consumers) if name in layer)
        block.load_state_dict(changed)
        assert torch.equal(run(block, x, text), expected), fold
        broken = dict(changed)
        broken[fold.producers[0]] = layer[fold.producers[0]]
        block.load_state_dict(broken)
        assert not torch.allclose(run(block, x, text), expected, rtol=1e-3), fold


def test_what_is_measured_after_folding_is_what_a_folded_layer_takes(text) -> None:
    fold = Fold(("norm",), ("weight",))
    x, scales = noise(50, 16, seed=1), noise(16, seed=2).round().exp2()
    divided, again = seen(x).divided(scales), seen(x / scales)
    for name in ("largest", "mean", "moment", "rows"):
        torch.testing.assert_close(getattr(divided, name), getattr(again, name))
    layer = fold.apply({"norm": torch.ones(16), "weight": noise(4, 16, seed=3)}, scales)
    torch.testing.assert_close((x * layer["norm"]) @ layer["weight"].T, x @ noise(4, 16, seed=3).T)


def outliers() -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs three channels of which are large, and weights that make little of them."""
    factor = torch.ones(64)
    factor[[3, 17, 40]] = 200.0
    return noise(300, 64, seed=1) * factor, {"norm": torch.ones(64), "weight": noise(32, 64, seed=2) / factor}


def error(x: Tensor, exact: Tensor, weight: Tensor) -> float:
    """Of linear_w8a8's definition."""
    near = torch.ops.staticvl.linear_w8a8(x, *quantize("w8a8", weight).values(), None, True)
    return float((near - exact).norm() / exact.norm())


def test_large_channels_cost_little_once_they_are_smoothed() -> None:
    x, layer = outliers()
    exact = x @ layer["weight"].T
    after, inputs = smoothed(layer, {"x": seen(x)}, {"x": Fold(("norm",), ("weight",))}, "w8a8")
    before = error(x, exact, layer["weight"])
    assert before > 0.05
    assert error(x * after["norm"], exact, after["weight"]) < before / 5
    torch.testing.assert_close(inputs["x"].largest, (x * after["norm"]).abs().amax(0))


def test_scales_are_ones_where_none_are_better() -> None:
    """Whole numbers that are stored exactly have no error to take off."""
    x = torch.arange(-127, 128).float()[:, None].repeat(1, 32)
    layer = {"norm": torch.ones(32), "weight": torch.full((8, 32), 127.0)}
    scales = best_scales(Fold(("norm",), ("weight",)), layer, seen(x), "w8a8")
    assert torch.equal(scales, torch.ones(32))


def test_it_is_the_rounded_inputs_that_count() -> None:
    """Weights that are stored exactly: all error is that of the inputs."""
    x, _ = outliers()
    layer = {"norm": torch.ones(64), "weight": noise(32, 64, seed=4).sign()}
    fold = Fold(("norm",), ("weight",))
    assert len(best_scales(fold, layer, seen(x), "w8a8").unique()) > 1


def test_scales_take_what_is_unknown_or_nothing_as_it_is() -> None:
    fold, weight = Fold(("norm",), ("weight",)), noise(8, 32, seed=1)
    nothing = StatisticsCollector(32, moment=True).statistics()
    for quant in ("w8a8", "w4a16"):
        assert torch.equal(best_scales(fold, {"norm": torch.ones(32), "weight": weight}, nothing, quant), torch.ones(32))
    x = noise(40, 32, seed=2) * torch.linspace(1, 100, 32)
    x[:, :5] = 0  # channels that never occur
    layer = {"norm": torch.ones(32), "weight": weight / torch.linspace(1, 100, 32)}
    scales = best_scales(fold, layer, seen(x), "w8a8")
    assert scales.isfinite().all() and (scales > 0).all() and len(scales.unique()) > 1
    assert torch.equal(scales.log2().round().exp2(), scales), "powers of two"


def test_key_value_heads_are_scaled_for_all_queries_that_they_serve() -> None:
    fold = Fold(("v",), ("o",), repeats=2, run=3)
    assert fold.spread(torch.arange(6.0)).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert fold.joined(torch.tensor([0.0, 9, 2, 3, 1, 5, 6, 7, 8, 0, 0, 9])).tolist() == [3, 9, 5, 6, 7, 9]


def test_what_is_gathered() -> None:
    """However the tokens come."""
    x = noise(1, 1000, 12, seed=1)
    gathering = StatisticsCollector(12, moment=True)
    for part in x.split([1, 700, 299], dim=1):
        gathering.add(part)
    found = gathering.statistics()
    rows = x[0]
    torch.testing.assert_close(found.moment, rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.largest, rows.abs().amax(0))
    torch.testing.assert_close(found.mean, rows.abs().mean(0))
    assert found.tokens == 1000 and SAMPLED <= len(found.rows) <= 2 * SAMPLED and torch.equal(found.rows, rows[::2])
    assert StatisticsCollector(12, moment=False).moment is None


def test_dequantised_weights_follow_the_scales() -> None:
    """What is stored stands for the folded weight."""
    x, layer = outliers()
    after, _ = smoothed(layer, {"x": seen(x)}, {"x": Fold(("norm",), ("weight",))}, "w4a16")
    near = dequantize("w4a16", quantize("w4a16", after["weight"]), 64)
    assert (near - after["weight"]).norm() < 0.2 * after["weight"].norm()
