"""`staticvl lint`, what `compile` does with its rules, and the table of dtypes."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from staticvl.compiler.build import build
from staticvl.compiler.card_check import CardError
from staticvl.compiler.options import Options
from staticvl.compiler.plan import Buckets
from staticvl.model_defs.config import QUANTS
from staticvl.runtime.artifact import ArtifactError, read_manifest
from staticvl.runtime.backends.ascend.kernel import load_graph
from staticvl.runtime.backends.ge_simulator import card_rules, ge_graph
from staticvl.runtime.backends.ge_simulator.card_rules import RULES, Finding, registry
from staticvl.tools import lint
from staticvl.tools.cli import main
from staticvl.tools.development import ascend_lint, ascend_registry

from .ascend import CHECKPOINTS
from .need_torchair import skip_without_torchair

BUCKETS = Buckets(prefill=(8,), decode=(1,), context=64, slots=1)


def options(out: Path, **changed) -> Options:
    return Options(checkpoint=CHECKPOINTS["llava"], out=out, buckets=BUCKETS, backend="ascend", **changed)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One graph runs op by op."""
    skip_without_torchair()
    out = tmp_path_factory.mktemp("lint") / "artifact"
    build(options(out, eager=("vision",)))
    return out


def test_what_is_printed(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{artifact}: 2 compiled graphs on 910B: 0 errors, ")
    assert "1 graphs run op by op, which rules say nothing of: vision-1" in said
    rule = RULES["slow.transpose"]
    assert f"warning  {rule.id}  " in said and f"  what   {rule.what}" in said and rule.source in said
    assert "  prefill-8: Transpose: [8, 2, 32] in the order [1, 0, 2]; " in said
    assert "more (--json names them)" in said
    assert all(len(line) <= 100 for line in said.splitlines()[1:] if " " in line.strip())


def test_json_has_every_node_and_agrees_with_the_manifest(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(artifact), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["card"], data["errors"], data["eager"]) == ("910B", 0, ["vision-1"])
    assert data["warnings"] == sum(len(rule["nodes"]) for rule in data["rules"]) > 0
    found = Counter((node["graph"], rule["id"]) for rule in data["rules"] for node in rule["nodes"])
    recorded = {
        (graph.name, rule): count
        for graph in read_manifest(artifact).graphs
        for rule, count in (graph.card_warnings or {}).items()
    }
    assert found == recorded


def test_the_other_card(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(artifact), "--card", "310P", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    errors = {rule["id"] for rule in data["rules"] if rule["severity"] == "error"}
    assert {"fia.card", "scatter.card"} <= errors
    assert [rule["severity"] for rule in data["rules"]] == sorted(rule["severity"] for rule in data["rules"])


def test_show_counts_warnings(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", str(artifact)])
    said = " ".join(capsys.readouterr().out.split())
    counts: Counter[str] = Counter()
    for graph in read_manifest(artifact).graphs:
        counts.update(graph.card_warnings or {})
    assert "card warnings " + ", ".join(f"{rule} {count}" for rule, count in counts.most_common()) in said


def test_an_artifact_for_a_cpu_has_no_card(embedded_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(embedded_artifact)]) == 1
    assert "was compiled for onnx, and cards are Ascend's; compile it with --backend ascend" in capsys.readouterr().err


def test_a_graph_is_read_without_running_its_code(artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(artifact)
    graph = next(graph for graph in manifest.graphs if graph.kind == "decode")
    spec = manifest.files[graph.file]
    assert "FusedInferAttentionScore" in ge_graph.parse(load_graph(artifact / graph.file, spec)).types()
    data = bytearray((artifact / graph.file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not the file that the manifest describes"):
        load_graph(tmp_path / "damaged", spec)


def test_an_error_stops_the_build_before_anything_of_the_graph_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_torchair()
    rule = RULES["fia.width"]
    monkeypatch.setattr(
        card_rules, "lint", lambda *_: (Finding(rule, "FusedInferAttentionScore", "F_1", "heads of 104 elements"),)
    )
    with pytest.raises(CardError) as error:
        build(options(tmp_path / "artifact", eager=("vision", "prefill")))
    assert str(error.value) == (
        f"decode-1 cannot run on Ascend910B: FusedInferAttentionScore F_1: heads of 104 elements; {rule.what} "
        f"({rule.id}, {rule.source}): {rule.remedy}"
    )
    assert not list((tmp_path / "artifact").glob("decode*")) and not (tmp_path / "artifact" / "manifest.json").exists()


# ---- full-size models


def test_few_layers_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_torchair()
    table = tmp_path / "lint.md"
    arguments = ["--variants", "w4a16-g32:float16:int8:1", "--graphs", "decode-1", "--markdown", str(table)]
    assert ascend_lint.main([str(CHECKPOINTS["mllama"]), *arguments]) == 0
    lines = table.read_text().splitlines()
    assert lines[0].startswith("1 graphs, 0 errors. Made with torch_npu ")
    assert any(re.match(r"- `slow\.w8_template`: \d+ nodes in 1 graphs of ", line) for line in lines)
    assert ascend_lint.main([str(CHECKPOINTS["mllama"]), *arguments, "--card", "310P"]) == 1
    assert ascend_lint.main([str(CHECKPOINTS["mllama"]), "--variants", "w8a16"]) == 1
    assert "error: " in capsys.readouterr().err


def test_the_variants_have_everything_once() -> None:
    columns = [set(column) for column in zip(*(text.split(":") for text in ascend_lint.VARIANTS), strict=True)]
    assert columns == [set(QUANTS), {"float16", "bfloat16"}, {"float", "int8"}, {"1", "2", "4", "8"}]


# ---- the table of dtypes


def test_the_table_is_made_of_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ascend_registry.PARTS:
        (tmp_path / f"aic-ascend910b-ops-info-{part}.json").write_text("{}")
    entry = {
        "attr": {"list": "dim"},
        "input0": {"dtype": "float, complex64,bfloat16,float", "name": "x"},
        "output0": {"dtype": "float,complex64,bfloat16,float", "name": "y"},
    }
    dump = {"Abs": entry, "Mul": {"input0": {"name": "x1"}, "output0": {"name": "y"}}, "NotOurs": entry}
    (tmp_path / "aic-ascend910b-ops-info-legacy.json").write_text(json.dumps(dump))
    out = tmp_path / "table.json"
    assert ascend_registry.main([str(tmp_path), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"Abs": {"inputs": {"x": "fb"}, "outputs": {"y": "fb"}}, "Mul": {}}
    assert ascend_registry.main([str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    assert "error: " in capsys.readouterr().err


def test_the_table_of_the_package() -> None:
    """As CANN's pages of these operators have it."""
    table = registry.operators()
    assert registry.REGISTRY.read_text() == ascend_registry.written(json.loads(registry.REGISTRY.read_text()))
    assert {table["AddRmsNorm"].dtypes(name) for name in ("x1", "x2", "gamma")} == {("float16", "float32", "bfloat16")}
    assert table["Add"].by_code and not table["DynamicQuant"].by_code
    assert len(list(table["RmsNorm"].combinations({"x": "bfloat16", "gamma": "float32"}, {"y": "bfloat16"}))) == 1
    assert not list(table["RmsNorm"].combinations({"x": "float16", "gamma": "bfloat16"}, {}))
    every = {name for rule in RULES.values() for name in rule.types if name != "any"}
    assert every <= {*table, *registry.ELSEWHERE}


def test_the_help_of_lint_names_both_cards(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lint", "--help"])
    said = capsys.readouterr().out
    assert "{910B,310P}" in said and "staticvl lint llava-7b-npu --card 310P" in said
    assert lint.WIDTH == 100
