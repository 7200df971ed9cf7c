"""The kernels of one layer, as the difference of two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from staticvl.compiler.emit_ascend import emit
from staticvl.runtime.backends.ge_simulator import ge_graph
from staticvl.tools.development.ascend_coverage import named_config
from staticvl.tools.development.kernel_count import FREE, Form, _definitions, counts, layers, main

from .need_torchair import skip_without_torchair
from .tiny_families import GOLDEN_QWEN

skip_without_torchair()

MLLAMA = Path(__file__).parent.parent / "tools" / "assets" / "tiny_mllama"


def test_as_many_as_each_further_layer_adds() -> None:
    """A graph of three layers more has three times the kernels of one more."""
    config = named_config(str(GOLDEN_QWEN))
    (row,) = counts(config, Form(), ["decode-4"])
    totals = []
    for depth in (3, 6):
        deep = replace(config, text=replace(config.text, layers=depth))
        graph = next(graph for key, graph in _definitions(deep, Form()) if key.kind == "decode")
        types = ge_graph.parse(emit(graph, "float16").graph).types()
        totals.append(sum(count for name, count in types.items() if name not in FREE))
    assert totals[1] - totals[0] == 3 * row.kernels > 0
    assert (row.types["MatMul"], row.types["Scatter"], row.types["FusedInferAttentionScore"]) == (4, 2, 1)
    assert not {"Reshape", "Identity", "Data"} & row.types.keys()


def test_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN_QWEN), "--graphs", "decode-4", "--quant", "w8a8"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:3] == ["checkpoint", "decode-4", "layer"] and "QuantBatchMatmulV3 4" in line
    assert main([str(GOLDEN_QWEN), "--graphs", "decode-4", "--tp", "2"]) == 0
    assert "HcomAllReduce 2" in capsys.readouterr().out
    assert main([str(GOLDEN_QWEN), "--tp", "64"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_cache_in_8_bits() -> None:
    """It rounds the new rows of keys and values: more kernels than a layer has over a cache of floats."""
    config = named_config(str(GOLDEN_QWEN))
    config = replace(config, text=replace(config.text, head_dim=32))
    floats, int8 = (next(counts(config, Form(kv_cache=each), ["decode-4"])) for each in ("float", "int8"))
    assert int8.types["FusedInferAttentionScore"] == 1 and int8.kernels > floats.kernels


def test_kinds_of_layers() -> None:
    """One layer of the kind more, and nothing else."""
    kinds = {layer.name: layer for layer in layers(named_config(str(MLLAMA)))}
    assert [*kinds] == ["layer", "cross layer", "tower layer"]
    for name, more in {"layer": (1, 0, 0), "cross layer": (0, 1, 0), "tower layer": (0, 0, 1)}.items():
        model, deeper = kinds[name].model, kinds[name].deeper
        found = [(each.text.self_layers, len(each.text.cross_layers), each.vision.layers) for each in (model, deeper)]
        assert tuple(b - a for a, b in zip(*found, strict=True)) == more
    assert [*(layer.name for layer in layers(named_config(str(GOLDEN_QWEN))))] == ["layer", "tower layer"]
