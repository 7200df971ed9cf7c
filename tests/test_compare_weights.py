"""The comparison of quantised weights: rounding raises no alarm, however long rows are, and a wrong scale of one row does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from staticvl.model_defs.config import ModelConfig
from staticvl.tools.comparing.thresholds import DEFAULTS
from staticvl.tools.comparing.weights import RankWeights, StoredWeights, WeightComparison
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.head_padding import head_width
from staticvl.weights.merging import merged_name
from staticvl.weights.source import open_source
from staticvl.weights.storage import quant_of, stored_targets, uniform

from .merged_models import model_config
from .wide_models import write_random

LONG = 11008  # a row of `down` in a 7B model
DOWN, HEAD = "text.layers.1.mlp.down.weight", "text.lm_head.weight"


def long_model() -> ModelConfig:
    config = model_config("llava")
    return replace(config, text=replace(config.text, intermediate_size=LONG))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(long_model(), tmp_path_factory.mktemp("checkpoint"))


def side(checkpoint: Path, out: Path, quant: str, tp: int = 1, *, ascend: bool = True) -> list[RankWeights]:
    """One backend's weights of all ranks."""
    config, sides = long_model(), []
    shapes = {name: stored.shape for name, stored in stored_targets(config, quant, tp=tp).items()}
    floats = uniform("float16" if ascend else "float32")
    for rank in range(tp):
        conversion = Conversion(quant=quant, prefix=f"r{rank}", ascend=ascend, floats=floats, tp=tp, rank=rank)
        weights = convert(open_source(checkpoint), config, out, conversion).weights
        sides.append(RankWeights(out, weights, quant, shapes, {name: head_width(config, name) for name in shapes}))
    return sides


def scales_of(weights: RankWeights, name: str) -> np.memmap:
    """The scales of a layer, to be changed in place."""
    stored = f"{name.removesuffix('.weight')}.scales"
    pieces = f"{stored.removesuffix('.scales')}.0.scales"
    spec = next(weights.weights[each] for each in (stored, merged_name(stored), pieces) if each in weights.weights)
    return np.memmap(weights.folder / spec.file, spec.dtype, mode="r+", offset=spec.offset, shape=spec.shape)


def findings(reference: list[RankWeights], candidate: list[RankWeights], names: tuple[str, ...] = ()) -> list[str]:
    comparison = WeightComparison(long_model(), StoredWeights(reference), StoredWeights(candidate), DEFAULTS)
    return [finding.text for name in names or comparison.names() for finding in comparison.compare(name)]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("quant", ["w8a16", "w4a16", "w8a8"])
def test_healthy_weights_raise_no_alarm(checkpoint: Path, tmp_path: Path, quant: str, tp: int) -> None:
    """Against floats, and against the blocks of an ONNX artifact, whole or cut."""
    candidate = side(checkpoint, tmp_path / "ascend", quant, tp)
    for reference in ("none", quant):
        expected = side(checkpoint, tmp_path / reference, reference, ascend=False)
        assert not findings(expected, candidate)
    assert quant_of(DOWN, quant) == quant and candidate[0].quantised(DOWN) and candidate[0].quantised(HEAD)


@pytest.mark.parametrize("factor", [1.02, 0.98, 0.0])
@pytest.mark.parametrize(("quant", "name"), [("w8a16", DOWN), ("w8a16", HEAD), ("w4a16", HEAD)])
def test_a_wrong_scale_of_the_smallest_row_is_seen(
    checkpoint: Path, tmp_path: Path, quant: str, name: str, factor: float
) -> None:
    """2 % of the row, which is less than a thousandth of the tensor."""
    small = tmp_path / "small"
    small.mkdir()
    tensors = load_file(checkpoint / "model.safetensors")
    own = next(each for each in tensors if each.endswith("layers.1.mlp.down_proj.weight" if name == DOWN else "lm_head.weight"))
    tensors[own][5] /= 100
    save_file(tensors, small / "model.safetensors")
    reference = side(small, tmp_path / "none", "none", ascend=False)
    candidate = side(small, tmp_path / "ascend", quant)
    assert not findings(reference, candidate, (name,))
    scales = scales_of(candidate[0], name)
    assert scales[5] < 0.05 * scales.max()
    scales[5] *= np.float16(factor)
    scales.flush()
    (text,) = findings(reference, candidate, (name,))
    assert "steps of its quantisation" in text and "row 5" in text
