"""The table of Ascend operators by graph, made from configs alone."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from staticvl.runtime.backends.ascend import torchair_host
from staticvl.tools.development import ascend_coverage
from staticvl.tools.development.ascend_coverage import Covered, definitions, main, markdown

from .need_torchair import skip_without_torchair
from .tiny_families import GOLDEN_QWEN

skip_without_torchair()

MLLAMA = Path(__file__).parent.parent / "tools" / "assets" / "tiny_mllama"


def test_every_graph_of_a_config_becomes_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ascend_coverage, "PREFILL", (8,))
    monkeypatch.setattr(ascend_coverage, "DECODE", (2,))
    config = tmp_path / "only-a-config"
    config.mkdir()
    shutil.copy(GOLDEN_QWEN / "config.json", config)
    assert main([str(config), "--markdown", str(tmp_path / "table.md")]) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith(f"Made with torch_npu {torchair_host.VERSION}, float16")
    items = " ".join("\n".join(lines[2:]).split()).removeprefix("- ").split(" - ")
    rows = [re.fullmatch(r"only-a-config, (\S+): (\d+) nodes, [\d.]+ s\. (.+)", item) for item in items]
    assert [row and row[1] for row in rows] == ["vision-1", "prefill-8", "decode-2"]
    for name, nodes, types in (row.groups() for row in rows if row):
        counts = {part.rpartition(" ")[0]: int(part.rpartition(" ")[2]) for part in types.split(", ")}
        assert int(nodes) == sum(counts.values())
        assert ("Scatter" in counts) == (name != "vision-1")
        assert counts["FusedInferAttentionScore"] == (3 if name == "vision-1" else 2)
        assert "Data" not in counts
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == ["vision-1", "prefill-8", "decode-2"]


def test_graphs_of_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.md"
    assert main([str(MLLAMA), "--tp", "2", "--graphs", "decode-4", "--markdown", str(table)]) == 0
    row = " ".join(table.read_text().splitlines()[2:])
    assert row.startswith("- tiny_mllama, one of 2, decode-4: ")
    layers = ascend_coverage.named_config(str(MLLAMA)).text.self_layers
    assert f"HcomAllReduce {2 * layers}," in row and "HcomAllGather 2," in row
    assert main([str(MLLAMA), "--tp", "64"]) == 1
    assert "error: " in capsys.readouterr().err


def test_the_graphs_of_a_model_with_cross_attention() -> None:
    config = ascend_coverage.named_config(str(MLLAMA))
    names = {graph.name for graph in definitions(config, "float16")}
    text = {
        f"{kind}{images}"
        for kind in ("prefill-1", "prefill-64", "decode-1", "decode-4")
        for images in ("", "-images-1", "-images-4")
    }
    assert names == {"vision-4", *text}


def test_a_known_model_needs_no_folder() -> None:
    assert ascend_coverage.named_config("llava-1.5-13b-hf").text.hidden_size == 5120


def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path) in error


def test_a_graph_that_does_not_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no converter")

    monkeypatch.setattr(ascend_coverage, "emit", broken)
    with pytest.raises(NotImplementedError) as caught:
        main([str(GOLDEN_QWEN)])
    assert caught.value.__notes__ == ["while compiling vision-1 of checkpoint"]


def test_the_list() -> None:
    row = Covered("m", "decode-1", {"MatMul": 3, "Add": 1}, 1.25)
    assert row.nodes == 4
    assert markdown([row], "bfloat16").splitlines()[-1] == "- m, decode-1: 4 nodes, 1.2 s. MatMul 3, Add 1"
    many = replace(row, types={f"Operator{n}": n for n in range(30)})
    lines = markdown([many], "bfloat16").splitlines()[2:]
    assert len(lines) > 4 and max(map(len, lines)) <= 100 and all(line.startswith("  ") for line in lines[1:])
