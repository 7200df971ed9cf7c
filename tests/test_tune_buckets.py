"""The whole command: from a trace to the file that compiling takes."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from staticvl.compiler.buckets import parse_buckets
from staticvl.tools.cli import main
from staticvl.tools.tuning.arrivals import with_times
from staticvl.tools.tuning.choose import TuningResult, choose, decode_cost
from staticvl.tools.tuning.comparison import BucketReason, cover, coverages, reasons, replay_powers_of_two
from staticvl.tools.tuning.costs import Costs, measured_costs
from staticvl.tools.tuning.curves import CostError
from staticvl.tools.tuning.limits import LimitError, Limits, compile_s
from staticvl.tools.tuning.report import buckets_yaml
from staticvl.tools.tuning.search import frontier, set_cost
from staticvl.tools.tuning.target import Target
from staticvl.tools.tuning.trace_error import TraceError
from staticvl.tools.tuning.traces import read_trace
from staticvl.tools.tuning.workload import Arrival, Workload, gather

from .conftest import EMBEDDED, REPO
from .test_cli import error, run

PUBLISHED_TRACE = REPO.parent / "shared" / "traces" / "azure_llm_2023_conv.csv"
# Of docs/tuning.md: one core, eight layers of width 512.
MEASURED = {
    ("prefill", 0): {16: 14.3, 32: 22.2, 64: 38.7, 128: 72.1, 256: 147.0, 512: 312.0, 1024: 694.0, 2048: 1802.0},
    ("decode", 0): {1: 9.5, 2: 11.6, 4: 11.6, 8: 16.5, 16: 22.1},
    ("vision", 0): {1: 51.0, 2: 102.0, 4: 220.0},
}


def costs(past_ms: float = 0.0) -> Costs:
    return measured_costs(MEASURED, "measured", past_ms)  # type: ignore[arg-type]


def target(**changes: object) -> Target:
    return Target(**{"name": "test", "costs": lambda context, slots: costs(), "row_bytes": 1000, **changes})  # type: ignore[arg-type]


def workload(*, tiles: bool = True, seen: tuple[int, ...] = (0,), count: int = 300) -> Workload:
    """Prompts of 20 to 700 tokens, every third with tiles, two a second."""
    found = Workload(requests=count)
    for i in range(count):
        prompt, cut, images = 20 + 37 * i % 680, (1 + i % 5) * (i % 3 == 0) * tiles, seen[i % len(seen)]
        found.lengths.setdefault(images, Counter())[prompt] += 1
        found.images[images] += 1
        found.totals[prompt + 20] += 1
        if cut:
            found.tiles[cut] += 1
        found.block.append(Arrival(i / 2, prompt, 1 + i % 40, cut, images))
    return found


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"time": i / 4, "prompt_tokens": 5 + 7 * i % 120, "generated": 1 + i % 9, "images": [[40, 30]] * (i % 3)}
        for i in range(90)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


# --- Choosing ------------------------------------------------------------------------------------------------------------


def spent(result: TuningResult) -> float:
    """Milliseconds of a request that the choice makes of the replay it was made for."""
    prefill, vision = (result.problems.get(kind) for kind in ("prefill", "vision"))
    assert prefill
    found = set_cost(prefill, result.chosen.prefill) + (set_cost(vision, result.chosen.vision) if vision else 0.0)
    return found / result.workload.requests + decode_cost(result, result.chosen.decode) / len(result.workload.block)


def test_more_graphs_never_cost_more() -> None:
    found = [choose(workload(), target(), Limits(graphs=graphs, slots=8, least_saving=0.0)) for graphs in (3, 5, 8, 16)]
    for result, graphs in zip(found, (3, 5, 8, 16), strict=True):
        assert result.chosen.graphs <= graphs
        assert result.chosen.slots == max(result.chosen.decode) == 8
    times = [spent(result) for result in found]
    assert times == sorted(times, reverse=True) and times[-1] < 0.9 * times[0]


def test_graphs_go_where_they_save_most() -> None:
    """No other way to divide them is better, for the decode steps at hand."""
    limits = Limits(graphs=7, slots=8, least_saving=0.0)
    result = choose(workload(), target(), limits)
    others = []
    for p in result.frontiers["prefill"]:
        for d in result.frontiers["decode"]:
            for v in result.frontiers["vision"]:
                if len(p.buckets) + len(d.buckets) + len(v.buckets) <= 7:
                    others.append((p.cost + v.cost) / result.workload.requests + d.cost / len(result.workload.block))
    assert spent(result) == pytest.approx(min(others), rel=1e-9)


def test_a_limit_on_the_time_of_compiling() -> None:
    free = choose(workload(), target(), Limits(slots=4, least_saving=0.0))
    limit = 0.6 * free.compile_s()
    result = choose(workload(), target(), Limits(slots=4, compile_s=limit, least_saving=0.0))
    assert result.compile_s() <= limit < free.compile_s()
    # No prefill set of as many graphs that leaves the time for the others is better.
    others = result.compile_s() - sum(compile_s(result.costs, "prefill", b, 0) for b in result.chosen.prefill)
    best = frontier(result.problems["prefill"], len(result.chosen.prefill), limit - others)[-1]
    assert set_cost(result.problems["prefill"], result.chosen.prefill) <= best.cost * (1 + 1e-9)
    with pytest.raises(LimitError, match="no choice keeps the limits; at least 3 graphs are needed"):
        choose(workload(), target(), Limits(slots=4, compile_s=3.0))
    with pytest.raises(CostError, match="only be estimated from measured costs"):
        bound = Costs("a bound", costs().curves)
        choose(workload(), target(costs=lambda context, slots: bound), Limits(compile_s=100.0))


def test_memory_limits_slots() -> None:
    free = choose(workload(), target(), Limits())
    assert free.chosen.slots > 1 and free.chosen.context == 768
    row = (768 + 16) * 1000
    tight = choose(workload(), target(weight_bytes=500), Limits(memory=2 * row + 500))
    assert tight.chosen.slots == 2 and set(tight.slots_tried) == {1, 2}
    with pytest.raises(LimitError, match=r"1 slots of 768 tokens and the weights take 0\.0 GB, but 0\.0 GB are allowed"):
        choose(workload(), target(weight_bytes=500), Limits(memory=row))


def test_too_few_graphs() -> None:
    with pytest.raises(LimitError, match="at least 3 graphs are needed, one of each kind and variant: raise --max-graphs"):
        choose(workload(), target(), Limits(graphs=2))


def test_prefill_sizes_beyond_the_context() -> None:
    with pytest.raises(LimitError, match="prefill size 4096 exceeds the context 768"):
        choose(workload(), target(), Limits(prefill_sizes=(16, 4096)))
    assert set(choose(workload(), target(), Limits(prefill_sizes=(32, 96, 512))).chosen.prefill) <= {32, 96, 512}


def test_everything_is_too_long() -> None:
    with pytest.raises(TraceError, match="all 7 requests are longer than the context of 16 tokens; give a larger --context"):
        choose(Workload(dropped=7), target(), Limits(context=16))


def test_images_by_cross_attention() -> None:
    """Variants count as graphs, the vision bucket is the model's, and `images` are written."""
    wide = {("prefill", 2): {16: 30.0, 1024: 900.0}, ("decode", 2): {1: 20.0, 16: 40.0}}
    table = measured_costs({**MEASURED, **wide}, "measured")  # type: ignore[arg-type]
    crossed = target(tiles=4, costs=lambda context, slots: table)
    result = choose(workload(seen=(0, 0, 2)), crossed, Limits(graphs=13, slots=4))
    chosen = result.chosen
    assert chosen.images == (1, 2) and chosen.vision == (4,)
    assert chosen.graphs == 1 + 3 * (len(chosen.prefill) + len(chosen.decode)) <= 13
    assert parse_buckets(yaml.safe_load(buckets_yaml(result, [])), "x").images == (1, 2)
    assert BucketReason("vision", 4, None, 1.0) in reasons(result)


# --- Comparing -----------------------------------------------------------------------------------------------------------


def test_coverages_by_hand() -> None:
    table = {16: 2.0, 64: 5.0}
    found = cover("x", [table], [{70: 2, 10: 1}], past_ms=0.01)
    # 70 is 64 and 16, the latter after 64; 10 is 16.
    assert found.ms == pytest.approx((2 * (7.0 + 0.01 * 16 * 64) + 2.0) / 3)
    assert found.padding == pytest.approx(1 - 150 / 176) and found.by_bucket == {64: 2, 16: 3}
    assert cover("x", [{16: 2.0, 128: 9.0}], [{70: 1, 10: 1}], chunks=False).ms == pytest.approx(5.5)


def test_the_choice_is_compared_with_powers_of_two() -> None:
    result = choose(workload(), target(), Limits(slots=4, least_saving=0.0))
    chosen, single, chunked, few = coverages(result, 16)
    assert chosen.ms * result.workload.requests == pytest.approx(set_cost(result.problems["prefill"], result.chosen.prefill))
    assert single.runs == 1.0 and single.buckets == chunked.buckets == (16, 32, 64, 128, 256, 512, 1024)
    assert chosen.ms <= few.ms <= single.ms and chunked.ms <= few.ms
    before = replay_powers_of_two(result, 16)
    assert before.padding("prefill") > result.replayed.padding("prefill")


def test_what_a_bucket_saves() -> None:
    result = choose(workload(), target(), Limits(slots=4))
    found = {(reason.kind, reason.bucket): reason for reason in reasons(result)}
    assert set(found) == {(kind, b) for kind in ("prefill", "decode", "vision") for b in result.chosen.of(kind)}  # type: ignore[arg-type]
    first = result.chosen.prefill[0]
    without = set_cost(result.problems["prefill"], result.chosen.prefill[1:])
    now = set_cost(result.problems["prefill"], result.chosen.prefill)
    assert found["prefill", first].saves_ms == pytest.approx((without - now) / result.workload.requests)
    assert found["decode", 4].saves_ms is None
    assert all(reason.saves_ms is None or reason.saves_ms >= 0 for reason in found.values())
    for kind in ("prefill", "decode", "vision"):
        assert sum(reason.share for reason in found.values() if reason.kind == kind) == pytest.approx(1.0)


# --- The command ---------------------------------------------------------------------------------------------------------


def test_from_a_trace_to_a_plan(
    capsys: pytest.CaptureFixture[str], trace: Path, embedded_artifact: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "buckets.yaml", tmp_path / "report.html"
    options = ("--artifact", embedded_artifact, "--out", out, "--report", report, "--explain", "--max-slots", 4)
    status, text, _ = run(capsys, "tune-buckets", trace, *options)
    assert status == 0
    for part in ("chosen: ", "in chunks", "prefill by number of graphs", "replay of arrivals", "saving of each bucket"):
        assert part in text
    buckets = parse_buckets(yaml.safe_load(out.read_text()), str(out))
    assert buckets.prefill and buckets.decode and buckets.vision and buckets.context and buckets.slots == max(buckets.decode)
    # One file that fetches nothing; the same again.
    page = report.read_text()
    assert page.count("<svg") == page.count("</svg>") == 4 and "knee" in page
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\((?!#)", page)
    run(capsys, "tune-buckets", trace, *options)
    assert report.read_text() == page
    status, text, _ = run(capsys, "compile", EMBEDDED, "--out", tmp_path / "a", "--buckets", out, "--plan-only")
    assert status == 0
    assert (
        f"prefill  {', '.join(map(str, buckets.prefill))}\n" in text and f"{buckets.slots} slots of {buckets.context}" in text
    )


def test_a_distribution_and_a_table_of_costs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out = tmp_path / "costs.yaml", tmp_path / "buckets.yaml"
    table.write_text("prefill: {16: 20, 256: 150}\ndecode: {1: 9, 8: 14}\n")
    given = ("--prompts", "20-300:3,400", "--generated", "5-20", "--rate", 2, "--replay", 200)
    status, text, _ = run(capsys, "tune-buckets", *given, "--costs", table, "--out", out, "--max-prefill-graphs", 2)
    assert status == 0 and "20000 requests" in text and "why each" not in text
    assert len(yaml.safe_load(out.read_text())["prefill"]) == 2
    status, text, _ = run(capsys, "tune-buckets", *given, "--costs", table, "--out", out, "--rate", 1000)
    assert status == 0 and "more requests arrive than can be served" in text


def test_milliseconds_taken_as_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A note names the unit, and the one that gives a usual load; with it, more slots are worthwhile."""
    table, out, path = tmp_path / "costs.yaml", tmp_path / "buckets.yaml", tmp_path / "trace.csv"
    table.write_text("prefill: {16: 20, 256: 150}\ndecode: {1: 9, 8: 14}\n")
    path.write_text("timestamp,input_length,output_length\n" + "".join(f"{100 * i},{50 + i},20\n" for i in range(60)))
    command, slots = ("tune-buckets", path, "--costs", table, "--out", out), []
    for unit in ((), ("--time-unit", "ms"), ("--rate", 1e-4)):
        status, text, _ = run(capsys, *command, *unit)
        assert status == 0
        assert ("taken as s, as the name 'timestamp' says no unit" in text) == (not unit)
        assert ("--time-unit ms if they are in ms" in text) == ("check the times" in out.read_text()) == (not unit)
        slots.append(yaml.safe_load(out.read_text())["slots"])
    assert slots[0] == slots[2] == 1 < slots[1]


def test_rows_left_out_are_noted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out, path = tmp_path / "costs.yaml", tmp_path / "buckets.yaml", tmp_path / "trace.csv.gz"
    table.write_text("prefill: {16: 20, 256: 150}\ndecode: {1: 9, 8: 14}\n")
    path.write_bytes(
        gzip.compress(("begin,a,b\n" + "".join(f"{i},{50 + i},{i % 5}\n" for i in range(60)) + "x,y,z\n").encode())
    )
    options = ("--columns", "prompt=a,output=b,time=begin", "--costs", table, "--out", out)
    status, text, _ = run(capsys, "tune-buckets", path, *options, "--skip-bad-rows")
    assert status == 0
    for note in (": 48 requests", "12 failed request(s), with 0 answer tokens", "1 row(s) left out", "line 62: "):
        assert note in text and note in out.read_text()
    assert "line 62: generated tokens is 'z'" in error(capsys, "tune-buckets", path, *options)


def test_sizes_to_choose_prefill_buckets_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The old name of the option means the same, and says what it is called now."""
    table, out = tmp_path / "costs.yaml", tmp_path / "buckets.yaml"
    table.write_text("prefill: {16: 20, 256: 150}\ndecode: {1: 9, 8: 14}\n")
    command = ("tune-buckets", "--prompts", "20-300:3,400", "--generated", "5-20", "--rate", 2, "--replay", 50, "--slots", 2)
    files, notes = [], []
    for name in ("--prefill-sizes", "--candidates"):
        status, _, err = run(capsys, *command, "--costs", table, "--out", out, name, "48,96,400")
        assert status == 0
        files.append(out.read_text())
        notes.append("--candidates is now called --prefill-sizes" in err)
    assert files[0] == files[1] and set(yaml.safe_load(files[0])["prefill"]) <= {48, 96, 400}
    assert notes == [False, True]
    with pytest.raises(SystemExit):
        main(["tune-buckets", "--help"])
    text = capsys.readouterr().out
    assert "--prefill-sizes" in text and "--candidates" not in text


WRONG = [
    (("{trace}", "--prompts", "5"), "give either a trace or --prompts"),
    ((), "give either a trace or --prompts"),
    (("--prompts", "5"), "--prompts needs --generated"),
    (("{trace}", "--generated", "5"), "leave them out, the trace has them"),
    (("{trace}", "--granularity", "0"), "--granularity is 0; expected at least 1"),
    (("{trace}", "--rate", "-1"), "--rate is -1.0; expected a positive number"),
    (("{trace}", "--image-size", "5"), "--image-size is '5'; expected width and height"),
    (("{trace}", "--prefill-sizes", "16,x"), "--prefill-sizes is '16,x'; expected sizes"),
    (("{trace}", "--candidates", "16,x"), "--candidates is '16,x'; expected sizes"),
    (
        ("{trace}", "--candidates", "16", "--prefill-sizes", "16"),
        "--candidates is the old name of --prefill-sizes; leave it out",
    ),
    (("{trace}", "--columns", "answer=b"), "--columns holds 'answer=b'; expected MEANING=NAME"),
    (("{trace}", "--report", "nowhere/r.html"), "nowhere is not a folder; make it"),
    (("{trace}", "--remeasure", "3"), "--remeasure runs the graphs of an artifact"),
    (("{trace}",), "nothing says how many tokens one takes; give --artifact or --checkpoint"),
    (("{empty}",), "empty.csv is empty"),
    (("{bad}",), "bad.csv, line 3: prompt tokens is 'x'"),
    (("{untimed}",), "does not say when requests arrived; give --rate"),
    (("{trace}", "--costs", "missing.yaml"), "missing.yaml does not exist"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_input_writes_nothing(
    capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    table, out = tmp_path / "costs.yaml", tmp_path / "out.yaml"
    table.write_text("prefill: {16: 20, 256: 150}\ndecode: {1: 9, 8: 14}\nvision: {1: 5}\n")
    files = {
        "empty": "",
        "bad": "prompt,ContextTokens,GeneratedTokens\n1,5,5\n1,x,5\n",
        "untimed": "ContextTokens,generated\n5,5\n",
    }
    paths = {"trace": trace}
    for name, text in files.items():
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text(text)
    out.write_text("before")
    before = sorted(tmp_path.iterdir())
    costs_option = () if "--costs" in given or "--remeasure" in given else ("--costs", table)
    said = error(capsys, "tune-buckets", *(part.format(**paths) for part in given), *costs_option, "--out", out)
    assert message in said
    assert out.read_text() == "before" and sorted(tmp_path.iterdir()) == before


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune-buckets", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "--max-graphs" in text and "--prompts 20-400:3" in text


# --- Real traffic --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED_TRACE.is_file(), reason="the published trace is not here")
def test_the_published_trace() -> None:
    """Six graphs for the prefill: hardly any padding, and a fifth less time than powers of two, earlier tokens counted."""
    found = gather(read_trace(PUBLISHED_TRACE), None, crossed=False, context=None, block=500)
    assert found.requests == 19_366
    found.block = with_times(found.block, 0.2)
    result = choose(found, target(costs=lambda context, slots: costs(past_ms=2.3e-4)), Limits(slots=4))
    assert len(result.chosen.prefill) <= 6
    chosen, single, chunked, _ = coverages(result, 16)
    assert single.padding == pytest.approx(0.303, abs=0.002)
    assert chosen.padding <= 0.02
    assert chosen.ms <= 0.8 * single.ms
    assert chosen.ms <= chunked.ms
