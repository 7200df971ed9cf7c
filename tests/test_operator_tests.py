"""Tests of single operators, which a card's owner runs: on the simulator they pass, and whatever is broken in it, they show."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from torch import Tensor

from staticvl.compiler.emit_ascend import emit
from staticvl.runtime.artifact import CacheSpec, CrossSpec, FileSpec
from staticvl.runtime.backends.ascend.backend import simulated
from staticvl.runtime.backends.ascend.kernel import load_kernel
from staticvl.runtime.backends.ge_simulator import card_rules, ge_graph
from staticvl.runtime.backends.ge_simulator.ge_ops import attention as simulated_attention
from staticvl.tools.operator_tests import kernels, process
from staticvl.tools.operator_tests.case import Case, Numbers, Setting, sizes_of
from staticvl.tools.operator_tests.cases import BUILDERS, builder, cases
from staticvl.tools.operator_tests.forms import Form, form, graph_forms, largest
from staticvl.tools.operator_tests.formulas import attended
from staticvl.tools.operator_tests.lowering import LoweringError, lower
from staticvl.tools.operator_tests.outcome import DIFFERS, PASSED, REFUSED, CaseInfo, Lowered, LoweredCases, Outcome
from staticvl.tools.operator_tests.report import PAGE, print_outcomes, remedy, rows
from staticvl.tools.operator_tests.running import distance, run_case
from staticvl.tools.operator_tests.tolerances import OPERATOR

from .merged_models import graphs
from .need_torchair import skip_without_torchair

skip_without_torchair()

HEADS = {"heads": 4, "kv_heads": 2}
SMALL = {"rows": 5, "features": 64, "inputs": 256}
ONE_ROW = {**SMALL, "rows": 1}
# Form -> the quantisation of the artifact that has it. Sizes that a card's own rules allow.
FORMS: dict[Form, str] = {
    form("cache_one", batch=4, tokens=1, **HEADS, keys=600, width=32): "none",
    form("cache_several", batch=1, tokens=6, **HEADS, keys=600, width=32): "none",
    form("int8_cache_one", batch=2, tokens=1, **HEADS, keys=600, width=32): "none",
    form("int8_cache_several", batch=1, tokens=6, **HEADS, keys=600, width=32): "none",
    form("cross_one", batch=3, tokens=1, **HEADS, keys=148, tiles=4, width=32): "none",
    form("cross_several", batch=1, tokens=5, **HEADS, keys=148, tiles=4, width=32): "none",
    form("whole", batch=2, tokens=10, heads=4, width=32): "none",
    form("padded", batch=1, tokens=12, heads=4, width=16): "none",
    form("product_one", **ONE_ROW): "none",
    form("product_bias_several", **SMALL): "none",
    form("int8_product_several", **SMALL): "w8a8",
    form("int8_product_bias_one", **ONE_ROW): "w8a8",
    form("swiglu_rows_several", **SMALL): "w8a8",
    form("w8_0_several", **SMALL): "w8a16",
    form("w8_128_asym_bias_one", **ONE_ROW): "w8a16-asym+float-head",
    form("w4_128_several", **SMALL): "w4a16",
    form("w4_32_asym_one", rows=1, features=24, inputs=96): "w4a16-asym+float-head",
    form("rms_norm", rows=5, width=64): "none",
    form("add_rms_norm", rows=5, width=64): "none",
    form("add_rms_norm_rows", rows=5, width=64): "w8a8",
    form("rows", rows=5, width=64): "w8a8",
    form("layer_norm", rows=5, width=64): "none",
    form("gelu", rows=5, width=64): "none",
    form("quick_gelu", rows=5, width=64): "none",
    form("swiglu", rows=5, width=64): "none",
    form("rotary_both_one", batch=2, tokens=1, heads=4, width=128, kv_heads=2): "none",
    form("rotary_several", batch=1, tokens=3, heads=4, width=32): "none",
    form("candidates", rows=2, vocabulary=560, count=40): "none",
}
BY_KIND = {each.kind: each for each in FORMS}
# Known faults of calls that no lowering of ours makes, or of a card for which nothing is compiled.
NOT_MADE = {"fault.shift_of_all_heads", "fault.packed_without_mask", "fault.int8_products_310p"}


def setting_of(each: Form, dtype: str = "float16") -> Setting:
    return Setting(dtype=dtype, quant=FORMS.get(each, "none"))


def ran(case: Case, setting: Setting, folder: Path) -> tuple[Outcome, ge_graph.GeGraph]:
    """The outcome of a case on the simulator, and its graph."""
    emitted = lower(case, setting)
    file = folder / "kernel"
    file.write_bytes(emitted.data)
    info = CaseInfo(case.name, {}, case.operators, case.watches, ("decode",))
    operands = case.operands(Numbers(setting.torch_dtype))
    kernel = load_kernel(file, FileSpec(nbytes=len(emitted.data), sha256=kernels.digest(emitted.data)))
    return run_case(info, operands, kernel, emitted.weights, setting, simulated()), ge_graph.parse(emitted.graph)


@pytest.mark.parametrize("kind", BY_KIND)
def test_a_card_that_is_right_passes(kind: str, tmp_path: Path) -> None:
    """The simulator is one; the formulas know nothing of it. What rules know of a graph's faults, its case watches for."""
    setting = setting_of(BY_KIND[kind])
    for case in cases([BY_KIND[kind]], setting):
        outcome, graph = ran(case, setting, tmp_path)
        assert outcome.status == PASSED, outcome
        assert outcome.distance is not None and outcome.distance < OPERATOR["float16"] / 2
        findings = card_rules.lint(graph)
        assert not [each for each in findings if each.rule.severity == "error"]
        assert {each.rule.id for each in findings if each.rule.known_fault} <= set(case.watches)


@pytest.mark.parametrize("kind", ["int8_cache_several", "product_bias_several", "cross_one", "candidates"])
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    setting = setting_of(BY_KIND[kind], "bfloat16")
    for case in cases([BY_KIND[kind]], setting):
        outcome, _ = ran(case, setting, tmp_path)
        assert outcome.status == PASSED and outcome.tolerance == 8e-2, outcome


def test_every_kind_and_every_known_fault_is_tested() -> None:
    assert {builder(kind) for kind in BY_KIND} == set(BUILDERS.values())
    made = [case for each in FORMS for case in cases([each], setting_of(each))]
    watched = {name for case in made for name in case.watches}
    known = {rule.id for rule in card_rules.RULES.values() if rule.known_fault}
    assert watched | NOT_MADE == known and not watched & NOT_MADE
    with pytest.raises(KeyError, match="unknown_one"):
        builder("unknown_one")


def test_sizes_need_no_data_and_numbers_are_the_same_in_every_process() -> None:
    for each in FORMS:
        for case in cases([each], setting_of(each)):
            bare = sizes_of(case, setting_of(each))
            first, second = (case.operands(Numbers(torch.float16)) for _ in range(2))
            for name in ("inputs", "weights"):
                parts = getattr(first, name)
                assert {key: (x.shape, x.dtype) for key, x in getattr(bare, name).items()} == {
                    key: (x.shape, x.dtype) for key, x in parts.items()
                }, case.name
                assert all(torch.equal(x, getattr(second, name)[key]) for key, x in parts.items())
            assert all(x.value.shape == first.expected[key].value.shape for key, x in bare.expected.items())


def test_a_case_that_is_lowered_to_something_else_is_an_error() -> None:
    (case,) = cases([BY_KIND["gelu"]], Setting(dtype="float16"))
    other = Case(name=case.name, form=case.form, operators=("FastGelu",), module=case.module, operands=case.operands)
    with pytest.raises(LoweringError, match="GELU: the graph has no FastGelu"):
        lower(other, Setting(dtype="float16"))


# ---- what is wrong shows


def mask_of_512_keys(whole: Callable[..., Any]) -> Callable[..., Any]:
    """The mask is ignored beyond key 512, with one query."""

    def mask(*given: Any) -> Tensor | None:
        made = whole(*given)
        if made is not None and made.shape[1] == 1:
            made = made.clone()
            made[..., 512:] = False
        return made

    return mask


def one_key_more(whole: Callable[..., Any]) -> Callable[..., Any]:
    return lambda given, name, rows, most: [min(each + 1, most) for each in whole(given, name, rows, most)]


def no_triangle(_whole: Callable[..., Any]) -> Callable[..., Any]:
    return lambda mode, count, length, *_: torch.zeros(count, length, dtype=torch.bool)


BROKEN: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "a mask beyond 512 keys": ("_mask", mask_of_512_keys, "cross_one", "a mask over 640 keys"),
    "a key too many in a decode step": ("_lengths", one_key_more, "cache_one", "attention over the cache"),
    "no causal mask": ("_hidden", no_triangle, "cache_several", "attention over the cache"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_faults_of_attention_show(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function, broken, kind, start = BROKEN[name]
    monkeypatch.setattr(simulated_attention, function, broken(getattr(simulated_attention, function)))
    setting = setting_of(BY_KIND[kind], dtype)
    case = next(each for each in cases([BY_KIND[kind]], setting) if each.name.startswith(start))
    outcome, _ = ran(case, setting, tmp_path)
    assert outcome.status == DIFFERS and outcome.output == "out", outcome


def test_a_cache_that_is_written_elsewhere_shows(tmp_path: Path) -> None:
    """Numbers that are only moved have to be the same to the bit."""
    setting = setting_of(BY_KIND["cache_one"])
    (case,) = cases([BY_KIND["cache_one"]], setting)
    operands = case.operands(Numbers(torch.float16))
    fed = list(operands.inputs)

    def kernel(tensors: list[Tensor]) -> Tensor:
        for name in ("k_cache.0", "v_cache.0"):
            tensors[fed.index(name)].copy_(operands.expected[f"{name}.out"].value)
        tensors[fed.index("v_cache.0")][1, 0, 0, 0] *= 1.001
        return operands.expected["out"].value

    outcome = run_case(CaseInfo(case.name, {}, (), (), ()), operands, kernel, (), setting, simulated())
    assert (outcome.status, outcome.output) == (DIFFERS, "v_cache.0.out")


def test_an_error_of_a_card_is_an_outcome() -> None:
    (case,) = cases([BY_KIND["gelu"]], Setting(dtype="float16"))

    def kernel(_tensors: Any) -> Any:
        raise RuntimeError("\nE80001: the operator\nis not there")

    info = CaseInfo(case.name, {}, (), (), ())
    operands = case.operands(Numbers(torch.float16))
    outcome = run_case(info, operands, kernel, (), Setting(dtype="float16"), simulated())
    assert (outcome.status, outcome.error, outcome.distance) == (REFUSED, "RuntimeError: E80001: the operator", None)


@pytest.mark.parametrize(
    ("computed", "expected"),
    [([[3.0, 4.0], [0.0, 1.0]], 0.0), ([[3.0, 4.5], [0.0, 1.0]], 0.1), ([[3.0, 4.0], [0.0, math.nan]], math.inf)],
)
def test_distance_is_that_of_the_worst_row(computed: list[list[float]], expected: float) -> None:
    assert distance(torch.tensor(computed), torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == pytest.approx(expected)


def test_attended_is_what_torch_computes() -> None:
    q, k, v = (torch.randn(2, heads, rows, 8, dtype=torch.float64) for heads, rows in ((4, 3), (2, 5), (2, 5)))
    visible = torch.rand(2, 3, 5) > 0.3
    visible[0, 1] = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=visible[:, None]
    )
    expected[0, :, 1] = v[0].mean(1).repeat_interleave(2, 0)
    torch.testing.assert_close(attended(q, k, v, visible), expected)


# ---- the calls of an artifact


KINDS_OF = {
    ("llava", "none", "prefill"): "add_rms_norm cache_several product_one product_several rms_norm swiglu rotary_several",
    ("llava", "w8a8", "decode"): "add_rms_norm_rows int8_product_several rows swiglu_rows_several w8_0_several cache_one",
    ("mllama", "none", "decode"): "cross_one",
}
SLOW_KINDS_OF = {
    ("llava", "w4a16", "decode"): "w8_0_several",
    ("mllama", "none", "vision"): "padded layer_norm gelu product_bias_several",
    ("mllama", "none", "prefill"): "cross_several",
    ("qwen_vl", "none", "vision"): "whole product_bias_several",
}


@pytest.mark.parametrize(
    ("family", "quant", "kind"), [*KINDS_OF, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_KINDS_OF)]
)
def test_forms_of_a_graph(family: str, quant: str, kind: str) -> None:
    """All have a builder, and the important ones are there."""
    graph = next(each for each in graphs(family, quant, heads=32) if each.kind == kind)
    parsed = ge_graph.parse(emit(graph, "float16").graph)
    forms = largest(graph_forms(graph.spec(), parsed, cache_of(graph.inputs, family)))
    expected = {**KINDS_OF, **SLOW_KINDS_OF}[family, quant, kind]
    assert set(expected.split()) <= {each.kind for each in forms}, forms
    for each in forms:
        assert cases([each], Setting(dtype="float16", quant=quant))


def cache_of(inputs: Any, family: str) -> CacheSpec:
    """As far as forms read it."""
    keys = next((each.shape[2] for each in inputs if each.name.startswith("cross_k")), 4)
    cross = CrossSpec(layers=1, images=1, rows=keys, tiles=4) if family == "mllama" else None
    return CacheSpec(layers=1, kv_heads=2, head_dim=32, slots=2, context=32, rows=40, dtype="float16", cross=cross)


def test_the_largest_of_each_kind() -> None:
    small, large = (form("rows", rows=rows, width=8) for rows in (1, 4))
    other = form("gelu", rows=1, width=1)
    assert largest([small, large, other, small]) == [other, large]


# ---- processes and reports


STUB = """
import sys
from pathlib import Path
action, folder, device, first = sys.argv[1:]
lines = Path(folder, "outcomes").read_text().splitlines()
for number, line in list(enumerate(lines))[int(first):]:
    print("a line of a library")
    if line == "crash":
        sys.exit(134)
    if line == "hang":
        import time
        time.sleep(60)
    print("outcome " + line, flush=True)
    if "refused" in line:
        sys.exit(7)  # as processes of a broken card end
"""


def test_a_case_that_ends_its_process_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    infos = [CaseInfo(f"case {i}", {}, ("MatMul",), (), ("decode",)) for i in range(5)]
    lowered = LoweredCases("float16", "none", tuple(Lowered(info, form("gelu"), 0) for info in infos))
    refused = Outcome(infos[1], REFUSED, 1e-2, error="no kernel")
    done = [Outcome(info, PASSED, 1e-2, 1e-4, "out") for info in infos]
    lines = [msgspec.json.encode(each).decode() for each in (done[0], refused, done[2], done[3], done[4])]
    lines[2], lines[3] = "crash", "hang"
    (tmp_path / "stub.py").write_text(STUB)

    def command(action: str, *arguments: Any) -> list[str]:
        if action == "lower":
            folder = arguments[1]
            (folder / "cases.json").write_bytes(msgspec.json.encode(lowered))
            (folder / "outcomes").write_text("\n".join(lines))
            return [sys.executable, "-c", ""]
        return [sys.executable, str(tmp_path / "stub.py"), action, *map(str, arguments)]

    monkeypatch.setattr(process, "_command", command)
    outcomes = process.run_operator_tests(tmp_path, "npu:0", patience=5)
    assert [each.case.name for each in outcomes] == [f"case {i}" for i in range(5)]
    assert [each.status for each in outcomes] == [PASSED, REFUSED, REFUSED, REFUSED, PASSED]
    assert [each.error for each in outcomes[1:4]] == [
        "no kernel", "the process ended with status 134", "no result after 5 s",
    ]  # fmt: skip


def test_a_folder_of_kernels(tmp_path: Path) -> None:
    """What is lowered in one process runs in another; a case that cannot be lowered is refused, and ends the process."""
    wrong = form("cache_one", batch=1, tokens=1, heads=3, kv_heads=2, keys=20, width=32)  # 3 heads of 2
    setting = Setting(dtype="float16")
    kernels.lower_forms({BY_KIND["gelu"]: ("vision",), wrong: ("decode",), BY_KIND["rows"]: ("decode",)}, setting, tmp_path)
    first = list(kernels.run_folder(tmp_path, simulated()))
    assert [(each.case.graphs, each.status) for each in first] == [(("vision",), PASSED), (("decode",), REFUSED)]
    assert first[1].error.startswith("it could not be lowered: ")
    assert [each.status for each in kernels.run_folder(tmp_path, simulated(), 2)] == [PASSED]


def test_reports_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    info = CaseInfo(
        "a mask over 640 keys", {"keys": 640}, ("FusedInferAttentionScore",), ("fault.mask_beyond_512_keys",), ("decode",)
    )
    outcomes = [
        Outcome(info, DIFFERS, 1e-2, 0.5, "out"),
        Outcome(info, REFUSED, 1e-2, error="RuntimeError: E80001"),
        Outcome(info, PASSED, 1e-2, 1e-4, "out"),
    ]
    print_outcomes(outcomes, "npu:0", Console(highlight=False))
    shown = capsys.readouterr().out
    assert "1 of 3 operator tests passed" in shown and "watches mask_beyond_512_keys" in shown
    assert "differs: the output out is 5.0e-01 away; expected at most 0.01" in shown
    assert "refused: RuntimeError: E80001" in shown
    text = remedy(outcomes[0])
    assert "--eager decode" in text and PAGE in text and "lengths in place of a mask" in text and "15503" in text
    assert [row["remedy"] == "" for row in rows(outcomes)] == [False, False, True]
    assert rows(outcomes)[0]["sizes"] == {"keys": 640}
    print_outcomes([], "npu:0", Console(highlight=False))
    assert "the artifact has no compiled graphs" in capsys.readouterr().out


def test_the_page_has_the_section() -> None:
    page, _, anchor = PAGE.partition("#")
    text = (Path(__file__).parent.parent / page).read_text(encoding="utf-8")
    assert f"## {anchor.replace('-', ' ').capitalize()}\n" in text


# ---- at the true sizes of models

TRUE = {
    # LLaVA-1.5-7B
    form("cache_one", batch=4, tokens=1, heads=32, kv_heads=32, keys=2624, width=128): "none",
    form("cache_several", batch=1, tokens=64, heads=32, kv_heads=32, keys=2624, width=128): "none",
    form("int8_cache_one", batch=4, tokens=1, heads=32, kv_heads=32, keys=2624, width=128): "none",
    form("product_several", rows=64, features=22016, inputs=4096): "none",
    form("w8_0_one", rows=1, features=22016, inputs=4096): "w8a16",
    form("add_rms_norm_rows", rows=64, width=4096): "w8a8",
    form("candidates", rows=4, vocabulary=32064, count=40): "none",
    # Llama-3.2-11B-Vision
    form("cross_one", batch=4, tokens=1, heads=32, kv_heads=8, keys=6404, tiles=4, width=128): "none",
    form("cross_several", batch=1, tokens=64, heads=32, kv_heads=8, keys=6404, tiles=4, width=128): "none",
}


@pytest.mark.slow
@pytest.mark.parametrize("each", TRUE, ids=lambda each: each.kind)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_true_sizes(each: Form, dtype: str, tmp_path: Path) -> None:
    setting = Setting(dtype=dtype, quant=TRUE[each])
    for case in cases([each], setting):
        outcome, _ = ran(case, setting, tmp_path)
        assert outcome.status == PASSED, outcome
