"""Traces as people have them, what they come to, and what is wrong with others."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from staticvl.compiler.model_info import read_model_info
from staticvl.model_defs.config import read_config
from staticvl.runtime.engine.request import Output, Timings
from staticvl.runtime.engine.request_log import RequestLog, RequestLogError, RequestRecord, read_request_log, record_of
from staticvl.runtime.processor.families import family
from staticvl.runtime.processor.tokenizer import load_tokenizer
from staticvl.tools.tuning import workload as workload_module
from staticvl.tools.tuning.columns import Request
from staticvl.tools.tuning.images import ImageCounter
from staticvl.tools.tuning.reading import Reading, parse_columns
from staticvl.tools.tuning.time_units import TimeReader, load_note
from staticvl.tools.tuning.trace_error import TraceError
from staticvl.tools.tuning.traces import parse_distribution, random_requests, read_trace
from staticvl.tools.tuning.workload import gather

from .conftest import EMBEDDED, REPO

ASSETS = EMBEDDED.parent
GOLDEN_QWEN = REPO / "tests" / "golden" / "qwen_vl_tiny" / "checkpoint"
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path: Path):
    def write(text: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- What is understood --------------------------------------------------------------------------------------------------


def test_the_published_form(trace) -> None:
    """Times have seven digits after the point."""
    text = HEAD + "2023-11-16 18:15:46.6805900,374,44\n\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read_trace(trace(text))
    assert (first.prompt, first.generated, second.prompt, second.generated) == (374, 44, 396, 109)
    assert first.time is not None and second.time is not None
    assert second.time - first.time == pytest.approx(4.314579)


@pytest.mark.parametrize(
    "head",
    [
        "prompt_tokens,completion_tokens,arrival_time",
        "Input Length;Output Length;Timestamp",
        "num_prefill_tokens\tnum_decode_tokens\tarrived_at",
    ],
)
def test_names_of_other_traces(trace, head: str) -> None:
    row = "7,3,1.5".replace(",", max(",;\t", key=head.count))
    assert list(read_trace(trace(f"\ufeff{head}\r\n{row}\r\n"))) == [Request(prompt=7, generated=3, time=1.5)]


@pytest.mark.parametrize(("time", "seconds"), [("12.5", 12.5), ("1700000000000", 1.7e9), ("2023-11-14T22:13:20+00:00", 1.7e9)])
def test_forms_of_time(trace, time: str, seconds: float) -> None:
    assert [each.time for each in read_trace(trace(HEAD + f"{time},7,3\n"))] == [seconds]
    assert [each.time for each in read_trace(trace("timestamp_ms,input_tokens,output_tokens\n250,7,3\n"))] == [0.25]


@pytest.mark.parametrize(
    ("column", "number", "unit", "seconds", "taken"),
    [
        ("timestamp", "12.5", None, 12.5, "s, as the name 'timestamp' says no unit"),
        ("timestamp", "250", "ms", 0.25, "ms, as --time-unit says"),
        ("timestamp_ms", "250", "us", 0.00025, "us, as --time-unit says"),
        ("arrival_time_ns", "46926808", None, 0.046926808, "ns, as the name 'arrival_time_ns' says"),
        ("startUs", "250", None, 0.00025, "us, as the name 'startUs' says"),
        ("startTimeUnixNano", "1700000000000000000", None, 1.7e9, "ns, as the name 'startTimeUnixNano' says"),
        ("begins", "5", None, 5.0, "s, as the name 'begins' says no unit"),
        ("time", "1700000000123456", None, 1700000000.123456, "us, as numbers of their size are since 1970"),
        ("time", "1700000000000000000", None, 1.7e9, "ns, as numbers of their size are since 1970"),
        ("time", "2023-11-14T22:13:20Z", "ms", 1.7e9, "dates"),
    ],
)
def test_units_of_time(column: str, number: str, unit: str | None, seconds: float, taken: str) -> None:
    times = TimeReader(unit)
    assert times.seconds(number, column, "line 1") == pytest.approx(seconds, rel=1e-15)
    assert times.taken == taken


@pytest.mark.parametrize(
    ("load", "taken", "parts"),
    [
        (0.02, "s, by default", ()),
        (99.0, "s, by default", ()),
        (0.0008, "s, by default", ("0.08 %", "taken as s, by default", "--time-unit ms if they are in ms")),
        (3e4, "ms, as --time-unit says", ("3e+06 %", "taken as ms", "--time-unit s if")),
        (2e-9, "s, by default", ("--time-unit ns if",)),
        (1e9, "s, by default", ("--rate gives another rate",)),
        (0.0008, "dates", ("taken as dates", "--rate gives another rate")),
        (0.0008, "", ()),
    ],
)
def test_an_absurd_load_names_the_unit(load: float, taken: str, parts: tuple[str, ...]) -> None:
    note = load_note(load, taken)
    assert bool(note) == bool(parts)
    assert all(part in note for part in parts)


@pytest.mark.parametrize(
    ("cell", "count", "sizes"),
    [
        ("", 0, ()),
        ("2", 2, ()),
        ("640x480", 1, ((640, 480),)),
        ("640x480;800X600", None, None),
        ('"[[640, 480], [800, 600]]"', 2, ((640, 480), (800, 600))),
    ],
)
def test_forms_of_images(trace, cell: str, count: int | None, sizes: tuple | None) -> None:
    path = trace(f"images,prompt_tokens,generated\n{cell},7,3\n")
    if count is None:
        with pytest.raises(TraceError, match=r"line 2: the size of an image is '800X600'"):
            list(read_trace(path))
    else:
        assert [(each.images, each.sizes) for each in read_trace(path)] == [(count, sizes)]


def test_json_lines_whose_fields_differ(trace) -> None:
    lines = [{"prompt_tokens": 5, "generated": 2}, {"prompt_tokens": 6, "generated": 1, "image_sizes": [[30, 20]], "time": 2}]
    found = list(read_trace(trace("\n".join(map(json.dumps, lines)), "t.jsonl")))
    assert found == [Request(5, 2), Request(6, 1, time=2.0, images=1, sizes=((30, 20),))]


def bench_results(**changes: object) -> str:
    """A result of a benchmark of a server: a list for each field, and one number of the whole."""
    lists = {"input_lens": [120, 340], "output_lens": [100, 80], "start_timestamps": [1.0, 2.5], "errors": ["", ""]}
    return json.dumps({"backend": "x", "duration": 4.2, "itls": [[0.1], [0.2]], **lists, **changes})


LATER = Request(10, 20, time=3.0)
FORMATS = {
    "usage": ('{"id": "a", "created": 3, "usage": {"prompt_tokens": 10, "completion_tokens": 20}}', [LATER]),
    "cached": (
        '{"time": 3, "usage": {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens": 20}}',
        [Request(10, 20, time=3.0, reused=4)],
    ),
    "spans": ('{"startTimeUnixNano": 3e9, "gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 20}', [LATER]),
    "spans, nested": ('{"time": 3, "gen_ai": {"usage": {"input_tokens": 10, "output_tokens": 20}}}', [LATER]),
    "counts": ('{"created_at": "1970-01-01T00:00:03Z", "prompt_eval_count": 10, "eval_count": 20}', [LATER]),
    "predicted": ('{"time": 3, "tokens_evaluated": 10, "tokens_predicted": 20}', [LATER]),
    "metadata": ('{"time": 3, "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 20}}', [LATER]),
    "with units": (
        '{"m": {"request_start_ns": 3e9}, "n": {"input_sequence_length": {"value": 10}, "osl": {"value": 20}}}',
        [LATER],
    ),
    "toks": ('{"input_toks": 10, "output_toks": 20, "arrival_time_ns": 3000000000, "ids": [5, 6]}', [LATER]),
    "isl": ("isl,osl,time\n10,20,3\n", [LATER]),
    "input": ("input,output,arrival\n10,20,3\n", [LATER]),
    "list": ('[{"time": 3, "input_length": 10, "output_length": 20}]', [LATER]),
    "list, indented": ('[\n {"time": 3,\n  "isl": 10,\n\n  "osl": 20}\n]\n', [LATER]),
    "object, indented": ('{\n "time": 3,\n "isl": 10,\n "osl": 20\n}\n', [LATER]),
    "list inside": ('{"model": "m", "tags": ["a"], "requests": [{"time": 3, "isl": 10, "osl": 20}]}', [LATER]),
    "bench": (bench_results(), [Request(120, 100, time=1.0), Request(340, 80, time=2.5)]),
    "bench, indented": (
        json.dumps(json.loads(bench_results()), indent=4),
        [Request(120, 100, time=1.0), Request(340, 80, time=2.5)],
    ),
    "bench, two": (f"{bench_results()}\n" * 2, [Request(120, 100, time=1.0), Request(340, 80, time=2.5)] * 2),
    "bench, long": (bench_results(texts=["a" * (1 << 20), "b"]), [Request(120, 100, time=1.0), Request(340, 80, time=2.5)]),
    "gzip": (gzip.compress(b"time,isl,osl\n3,10,20\n"), [LATER]),
    "gzip of JSON": (gzip.compress(b'[{"time": 3, "isl": 10, "osl": 20}]'), [LATER]),
    "utf-16": ("time,isl,osl\n3,10,20\n".encode("utf-16"), [LATER]),
    "thousands": ('time,isl,osl\n3,"1,010",20\n', [Request(1010, 20, time=3.0)]),
    "line break": ('prompt,isl,osl,time\n"a\nb, c\n",10,20,3\n"d",10,20,3\n', [LATER, LATER]),
    "image size": ("time,isl,osl,image_size\n3,10,20,640x480\n", [Request(10, 20, 3.0, 1, ((640, 480),))]),
    "image size of two": (
        '{"time": 3, "isl": 10, "osl": 20, "num_images": 2, "image_size": {"width": 640, "height": 480}}',
        [Request(10, 20, 3.0, 2, ((640, 480),) * 2)],
    ),
    "no image": ('{"time": 3, "isl": 10, "osl": 20, "num_images": 0, "image_size": [640, 480]}', [LATER]),
}


@pytest.mark.parametrize(("data", "requests"), FORMATS.values(), ids=FORMATS)
def test_formats(trace, data: str | bytes, requests: list[Request]) -> None:
    reading = Reading()
    assert list(read_trace(trace(data), reading)) == requests
    assert reading.notes() == []


LEFT_OUT = {
    "comments": ("# one\n# two, three\ntime,isl,osl\n3,10,20\n", ["2 line(s) before the requests left out"]),
    "comments, JSON": ('# one\n{"time": 3, "isl": 10, "osl": 20}\n', ["1 line(s) before the requests left out"]),
    "names as a comment": ("# time,isl,osl\n3,10,20\n", []),
    "a title": ("trace of March\ntime,isl,osl\n3,10,20\n", ["1 line(s) before the requests left out"]),
    "metadata": ('{"meta": {"isl": 5}}\n{"time": 3, "isl": 10, "osl": 20}\n', ["1 line(s) before the requests left out"]),
    "failed": (
        "time,isl,osl\n1,10,0\n3,10,20\n4,0,0\n",
        ["2 failed request(s), with 0 answer tokens, left out"],
    ),
}


@pytest.mark.parametrize(("data", "notes"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_lines_left_out_are_counted(trace, data: str, notes: list[str]) -> None:
    reading = Reading()
    assert list(read_trace(trace(data), reading)) == [LATER]
    assert reading.notes() == notes


BAD_ROWS = {
    "csv": "time,isl,osl\n1,x,5\n3,10,20\n1,5\nsoon,5,5\n",
    "json lines": '{"time": 3, "isl": "x", "osl": 20}\n{"time": 3, "isl": 10, "osl": 20}\n{"time": 3,\n{"error": "x"}\n',
    "json list": '[{"isl": "x", "osl": 20}, 5, {"error": 5}, {"time": 3, "isl": 10, "osl": 20}]',
}


@pytest.mark.parametrize("data", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_skipped_and_counted(trace, data: str) -> None:
    with pytest.raises(TraceError):
        list(read_trace(trace(data)))
    reading = Reading(skip_bad_rows=True)
    assert list(read_trace(trace(data), reading)) == [LATER]
    (note,) = reading.notes()
    assert note.startswith("3 row(s) left out, as --skip-bad-rows says; the first: ")
    assert "prompt tokens is 'x'" in note


@pytest.mark.parametrize(
    "data", ["begin,a,b,isl,osl\n3,10,20,7,7\n", '{"x": {"begin": 3, "a": 10, "b": 20}, "isl": 7, "osl": 7}']
)
def test_chosen_columns(trace, data: str) -> None:
    prefix = "x." if data.startswith("{") else ""
    columns = parse_columns(f"prompt={prefix}a, output={prefix}b,time={prefix}begin")
    assert list(read_trace(trace(data), Reading(columns=columns))) == [LATER]
    with pytest.raises(TraceError, match=r"--columns names 'c', but there are .*isl, osl"):
        list(read_trace(trace(data), Reading(columns={"time": "c"})))


@pytest.mark.parametrize("text", ["prompt", "prompt=", "answer=x", "prompt=a,,output=b"])
def test_wrong_chosen_columns(text: str) -> None:
    with pytest.raises(TraceError, match="expected MEANING=NAME, where MEANING is one of output, prompt"):
        parse_columns(text)


# --- What is wrong -------------------------------------------------------------------------------------------------------

WRONG = [
    ("", "is empty"),
    ("\n \n", "is empty"),
    (HEAD, "holds no request"),
    ("a,b\n1,2\n", r"line 1: no column says how many tokens the prompts have; there are a, b"),
    ("ContextTokens,x\n1,2\n", r"line 1: no column says how many tokens the answers have"),
    (HEAD + "1,5,5\n2,x,5\n", r"line 3: prompt tokens is 'x'; expected a whole number"),
    (HEAD + "\n1,5,5\n\n\n2,x,5\n", r"line 6: prompt tokens is 'x'"),
    (HEAD + "1,5,5\n2,5.5,5\n", r"line 3: prompt tokens is '5\.5'"),
    (HEAD + "1,-5,5\n", r"line 2: prompt tokens is '-5'; expected a whole number of at least 0"),
    (HEAD + "1,inf,5\n", r"line 2: prompt tokens is 'inf'"),
    (HEAD + "1,nan,5\n", r"line 2: prompt tokens is 'nan'"),
    (HEAD + "1,0,5\n", r"line 2: the request has no prompt tokens"),
    (HEAD + "1,99999999,5\n", r"line 2: prompt tokens is '99999999', more than 1048576"),
    (HEAD + "soon,5,5\n", r"line 2: the time is 'soon'"),
    (HEAD + "nan,5,5\n", r"line 2: the time is 'nan'"),
    (HEAD + "1,5\n", r"line 2: the line has 2 columns, but the first has 3"),
    (HEAD + '1,"5,5\n', r"line 2: .*; expected one request as CSV"),
    ("ContextTokens,ContextTokens,GeneratedTokens\n1,2,3\n", "the column ContextTokens is there twice"),
    (HEAD.encode() + b"1,\xff,5\n", r"line 2: the line is not UTF-8"),
    (HEAD.encode() + b"1,5\0,5\n", r"line 2: the line holds a zero byte"),
    (HEAD + "1," + "5" * (1 << 20) + ",5\n", r"line 2: the line has more than"),
    ('{"prompt_tokens": 5, "generated": 2}\n{"prompt_tokens": 5,\n', r"line 2: .*; expected one JSON object"),
    ('{"prompt_tokens": 5, "generated": 2}\n[5]\n', r"line 2, entry 1: .*; expected one JSON object"),
    ('{"prompt_tokens": 5, "generated": 2}\n{"x": 1}\n', r"line 2: no column says"),
    (gzip.compress(HEAD.encode() * 9)[:-12], "cannot be decompressed"),
    ("# only\n", "holds only comments"),
    (HEAD + "1,5,0\n", r"holds no request \(1 failed request"),
    (bench_results(output_lens=[1]), "line 1: input_lens has 2 items, but output_lens 1; expected one a request"),
    (
        '{"a": {"isl": 1}, "b": {"isl": 2}, "osl": 5}',
        r"line 1: 'a\.isl' and 'b\.isl' may both be meant; name one with --columns",
    ),
    (
        '[{"id": "a", "conversations": []}]',
        "no column says .*; there are id, conversations; name one .* --columns prompt",
    ),
    ('{"prompt_tokens": 5, "generated": 2, "image_size": 5123}', "the size of an image is 5123; expected its width and height"),
    ('[\n{"isl": 5,\n', r"line 1: .*; expected one JSON object"),
    ('{"prompt_tokens": true, "generated": 2}\n', r"line 1: prompt tokens is True"),
    ('{"prompt_tokens": [[5]], "generated": 2}\n', r"line 1: prompt tokens is \[\[5\]\]"),
    ('{"prompt_tokens": 5, "generated": 2, "images": [[0, 5]]}\n', r"line 1: an edge of an image is 0"),
    ('{"prompt_tokens": 5, "generated": 2, "images": "[[5"}\n', r"line 1: images are"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=range(len(WRONG)))
def test_errors_name_the_line(trace, text: str | bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        list(read_trace(trace(text)))
    assert len(str(caught.value)) < 400


def test_many_kinds_of_lines(trace) -> None:
    lines = [json.dumps({"prompt_tokens": 5, "generated": 2, f"x{i}": 0}) for i in range(1002)]
    with pytest.raises(TraceError, match="line 1001: lines have more than 1000 different sets of fields"):
        list(read_trace(trace("\n".join(lines))))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is not a file; expected a trace"):
        list(read_trace(tmp_path))


# --- The log of the runtime ----------------------------------------------------------------------------------------------

RECORD = RequestRecord(
    time=1.7e9, prompt_tokens=20, image_sizes=((640, 480),), image_tokens=576, reused_tokens=100, generated=8,
    finish_reason="stop", queue_s=0.1, vision_s=0.2, prefill_s=0.3, first_token_s=0.6, per_token_s=0.05, total_s=1.0,
)  # fmt: skip


def test_a_log_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with RequestLog(path) as log:
        log.write(RECORD)
    with RequestLog(path) as log:  # goes on where it was
        log.write(RECORD)
    assert list(read_request_log(path)) == [RECORD, RECORD]
    expected = Request(prompt=20, generated=8, time=1.7e9, images=1, sizes=((640, 480),), image_tokens=576, reused=100)
    assert list(read_trace(path)) == [expected, expected]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with RequestLog(path) as log:
        log.write(RECORD)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-10])
    assert list(read_request_log(path)) == [RECORD]
    path.write_bytes(whole[:-10] + b"\n" + whole)
    with pytest.raises(RequestLogError, match=r"line 1: .*; expected a record"):
        list(read_request_log(path))


def test_the_record_of_an_answer() -> None:
    timings = Timings(queue_s=0.1, vision_s=0.2, prefill_s=0.3, first_token_s=0.6, per_token_s=0.05, total_s=1.0)
    output = Output(
        text="x", token_ids=[1] * 8, finish_reason="stop", boxes=[], prompt_tokens=596, image_tokens=576, timings=timings
    )
    assert record_of(output, 1.7e9, ((640, 480),), 100) == RECORD


# --- Distributions -------------------------------------------------------------------------------------------------------


def test_a_distribution() -> None:
    found = parse_distribution("10-12:3, 20:1", "--prompts")
    assert found.values.tolist() == [10, 11, 12, 20]
    assert found.shares.tolist() == [0.25] * 4
    draw = [random_requests(found, parse_distribution("5", "--generated"), None, 2.0, 4000) for _ in range(2)]
    first, second = map(list, draw)
    assert first == second
    counted = Counter(each.prompt for each in first)
    assert set(counted) == {10, 11, 12, 20} and all(abs(count - 1000) < 120 for count in counted.values())
    times = [each.time for each in first]
    assert times == sorted(times, key=float) and times[-1] == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("text", ["", "x", "5-3", "5:0", "5:-1", "5:x", "5,,6", "5-", "1e3", "12345678"])
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(TraceError, match=r"--prompts holds .*; expected N, N-M, N:SHARE"):
        parse_distribution(text, "--prompts")


# --- Counting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [ASSETS / "tiny_llava15", ASSETS / "tiny_llava16", ASSETS / "tiny_mllama", GOLDEN_QWEN])
def test_images_take_what_the_runtime_gives_them(folder: Path) -> None:
    """Tokens and tiles, for sizes that are cut in every way."""
    info, _ = read_model_info(folder, read_config(folder), vision_tower=None)
    tokenizer, mark = load_tokenizer(folder, info.tokenizer), info.image.mark
    for size in ((30, 20), (200, 50), (50, 200), (64, 64), (300, 300), (7, 90)):
        prompt = family(info.family).raw_prompt(
            "<img></img>" if info.family == "qwen_vl" else mark, [Image.new("RGB", size)], info, tokenizer
        )
        assert ImageCounter(info, size).count(size) == (prompt.image_tokens, len(prompt.pixels))


def test_a_workload() -> None:
    folder = ASSETS / "tiny_llava16"
    info, _ = read_model_info(folder, read_config(folder), vision_tower=None)
    counter = ImageCounter(info, usual=(30, 20))
    usual, wide = (counter.count(size) for size in ((30, 20), (200, 50)))
    requests = [
        Request(10, 5, time=1.0),
        Request(10, 5, time=2.0, images=2),  # of sizes that are not known
        Request(10, 5, time=3.0, images=1, sizes=((200, 50),), image_tokens=7),  # counted anew for this model
        Request(10, 5, time=4.0, images=1, image_tokens=7),
        Request(10, 0, time=5.0, reused=4),
        Request(996, 5, time=6.0),  # one more than fits
    ]
    found = gather(requests, counter, crossed=False, context=1000, block=10)
    assert (found.requests, found.dropped, found.generated) == (5, 1, 20)
    lengths = [10, 10 + 2 * usual[0], 10 + wide[0], 17, 6]
    assert found.lengths == {0: Counter(lengths)} and found.every_length == Counter(lengths)
    assert found.tiles == Counter([2 * usual[1], wide[1], usual[1]])
    assert found.images == Counter({0: 2, 1: 2, 2: 1})
    assert max(found.totals) == max(lengths) + 5
    assert [each.time for each in found.block] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [each.generated for each in found.block] == [5, 5, 5, 5, 1]  # a prompt always gives one token
    crossed = gather(requests, counter, crossed=True, context=None, block=10)
    assert set(crossed.lengths) == {0, 1, 2} and [each.images for each in crossed.block] == [0, 2, 1, 1, 0, 0]


def test_a_block_of_a_long_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that followed one another, the same ones each time, each block as likely as the others; no more are kept."""

    def begin() -> int:
        found = gather((Request(1, 1, time=float(i)) for i in range(1005)), None, crossed=False, context=None, block=100)
        times = [each.time for each in found.block]
        assert found.requests == 1005 and len(times) == 100
        assert times == [times[0] + i for i in range(100)]  # type: ignore[operator]
        return int(times[0] or 0) // 100

    assert begin() == begin()
    firsts = []
    for seed in range(200):
        monkeypatch.setattr(workload_module, "_SEED", seed)
        firsts.append(begin())
    assert set(firsts) == set(range(10)) and np.bincount(firsts).max() < 40
