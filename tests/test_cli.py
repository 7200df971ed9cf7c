"""The command line as a user meets it: output, exit status, one-line errors."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from staticvl.runtime import load
from staticvl.runtime.artifact import read_manifest
from staticvl.runtime.backends.cores import processor_name
from staticvl.runtime.backends.unsigned_weights import PRECISE, saturates
from staticvl.runtime.engine.request_log import read_request_log
from staticvl.runtime.sampling.params import SETTINGS, SamplingParams
from staticvl.tools.bench_requests import BenchRequest, arrival_times
from staticvl.tools.cli import build_parser, main
from staticvl.tools.sampling_options import read_sampling
from staticvl.tools.tuning.traces import read_trace

from .checkpoints import tiny_llava
from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED

BUCKETS = "prefill: [8, 16]\ndecode: [1, 2]\nvision: [1]\ncontext: 64\nslots: 2\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("cli") / "checkpoint").folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "buckets.yaml").write_text(BUCKETS)
    assert main(["compile", str(checkpoint), "--out", str(folder / "a"), "--buckets", str(folder / "buckets.yaml")]) == 0
    return folder / "a"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def error(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a failing command prints."""
    status, out, err = run(capsys, *args)
    assert status == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("staticvl: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_compile_again_reports_nothing_to_do(capsys: pytest.CaptureFixture[str], checkpoint: Path, artifact: Path) -> None:
    status, out, _ = run(capsys, "compile", checkpoint, "--out", artifact, "--buckets", artifact.parent / "buckets.yaml")
    assert status == 0
    assert "0 graphs compiled, 5 unchanged, weights unchanged" in out


def test_show_and_verify(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    status, out, _ = run(capsys, "show", artifact)
    assert status == 0
    for text in ("llava (hf layout)", "2 slots of 64 tokens", "prefill", "decode", "vision", processor_name()):
        assert text in out
    status, out, _ = run(capsys, "verify", artifact)
    assert status == 0
    assert "every digest matches" in out
    assert "5 graphs were certified" in out


def test_generate_prints_json(capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    args = ("generate", artifact, "--prompt", "What is this?", "--image", tmp_path / "red.png", "--max-new-tokens", 5, "--json")
    status, out, _ = run(capsys, *args, "--ignore-eos")
    assert status == 0
    answer = json.loads(out)
    assert len(answer["token_ids"]) == 5
    assert answer["image_tokens"] == 16
    assert answer["finish_reason"] == "length"
    assert answer["timings"]["total_s"] > 0
    _, again, _ = run(capsys, *args, "--ignore-eos", "--temperature", 1.5, "--seed", 3)
    _, same, _ = run(capsys, *args, "--ignore-eos", "--temperature", 1.5, "--seed", 3)
    assert json.loads(again)["token_ids"] == json.loads(same)["token_ids"] != answer["token_ids"]


def test_bench_ends_with_json(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    status, out, _ = run(capsys, "bench", artifact, "--new-tokens", 4, "--repeats", 1)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert set(result["ttft_ms"]) == {"16"}
    assert set(result["tokens_per_s"]) == {"1", "2"}
    assert result["decode_step_outside_us"] > 0
    assert result["machine"]["session_entries"] == ({PRECISE: "1"} if saturates() else {})
    assert {"uss_mb", "weights_mb", "cache_mb"} <= set(result["memory"])
    status, out, _ = run(capsys, "bench", artifact, "--new-tokens", 4, "--repeats", 1, "--json")
    assert len(out.splitlines()) == 1


def test_a_log_of_requests_that_the_tuner_reads(capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path) -> None:
    """Every request that ends is a line, whether it was generated, streamed, cancelled or a turn of a chat."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    log = tmp_path / "served.jsonl"
    args = ("generate", artifact, "--prompt", "What?", "--image", tmp_path / "red.png", "--max-new-tokens", 5, "--ignore-eos")
    assert run(capsys, *args, "--request-log", log)[0] == 0
    model = load(artifact, request_log=log)
    list(model.stream("Hello", max_new_tokens=3, ignore_eos=True))
    next(stream := model.stream("Hello", max_new_tokens=20, ignore_eos=True))
    stream.close()
    with model.chat() as chat:
        chat.send("Hello", max_new_tokens=2, ignore_eos=True)
    records = list(read_request_log(log))
    assert [record.finish_reason for record in records] == ["length", "length", "cancelled", "length"]
    assert [record.generated for record in records][::3] == [5, 2]
    assert [record.image_sizes for record in records] == [((50, 40),), (), (), ()]
    assert [record.image_tokens for record in records] == [16, 0, 0, 0]
    assert records[3].reused_tokens == records[3].prompt_tokens - 1
    assert all(abs(record.time - time.time()) < 600 and record.total_s >= record.first_token_s > 0 for record in records)
    assert [request.images for request in read_trace(log)] == [1, 0, 0, 0]


def test_traffic_from_a_file(capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    lines = [{"prompt": "Hello", "max_new_tokens": n} for n in (2, 3, 4)]
    lines.append({"prompt": "What?", "images": ["red.png"], "max_new_tokens": 2})
    requests, log = tmp_path / "requests.jsonl", tmp_path / "served.jsonl"
    requests.write_text("\n\n".join(map(json.dumps, lines)))
    status, out, _ = run(capsys, "bench", artifact, "--requests", requests, "--rate", 200, "--seed", 1, "--request-log", log)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert result["requests"] == 4 == sum(result["finished"].values())
    assert {"p50", "p90", "p99", "max", "mean", "sd"} == set(result["ttft_ms"]) == set(result["between_tokens_ms"])
    assert {"date", "threads", "machine", "versions"} <= result.keys() and 10 < result["peak_mb"] < 1e5
    assert result["prefix_hit_rate"] > 0 and result["runs"]["vision"] == 1
    assert [record.image_tokens for record in read_request_log(log)].count(16) == 1
    timed = tmp_path / "timed.jsonl"
    timed.write_text("\n".join(json.dumps({**line, "time": 1e9 + n / 50}) for n, line in enumerate(lines)))
    status, out, _ = run(capsys, "bench", artifact, "--requests", timed, "--json", "--no-reuse", "--prefill-budget", 16)
    result = json.loads(out)
    assert (status, result["prefix_hit_rate"], result["requests"]) == (0, 0.0, 4)
    assert result["span_s"] >= 3 / 50


def test_answers_of_one_token_have_no_time_per_token(
    capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(json.dumps({"prompt": "Hello", "max_new_tokens": n, "time": 0}) for n in (1, 1, 1, 4)))
    result = json.loads(run(capsys, "bench", artifact, "--requests", requests, "--json")[1])
    assert result["tpot_ms"]["p50"] == result["tpot_ms"]["mean"] == result["tpot_ms"]["max"] > 0
    assert result["tpot_ms"]["sd"] == 0


def test_arrival_times() -> None:
    times = arrival_times([BenchRequest("x")] * 4000, 5.0, 1)
    assert times == arrival_times([BenchRequest("x")] * 4000, 5.0, 1) != arrival_times([BenchRequest("x")] * 4000, 5.0, 2)
    gaps = [after - before for before, after in pairwise(times)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.1)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), rel=0.1)
    assert arrival_times([BenchRequest("x", time=7.0), BenchRequest("x", time=6.5)], None, 0) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request; expected a line for each"),
        ('{"prompt": "x", "time": 1}\n{"prompt": 5}', r"line 2: .*\$\.prompt.*; expected a JSON object with prompt"),
        ('{"prompt": "x", "image": 1}', "line 1: .*image.*; expected a JSON object with prompt"),
        ('{"prompt": "x"}', r"not every request has a time; give --rate"),
    ],
)
def test_unusable_traffic(capsys: pytest.CaptureFixture[str], artifact: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    status, _, err = run(capsys, "bench", artifact, "--requests", path)
    assert status == 1 and re.search(message, err)
    path.write_text('{"prompt": "x"}')
    assert (
        "--rate is 0.0; expected a number of requests a second above 0"
        in run(capsys, "bench", artifact, "--requests", path, "--rate", 0)[2]
    )


# --- Images by cross-attention, and in tiles ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose images enter by cross-attention, from a config file."""
    folder = tmp_path_factory.mktemp("cross")
    tiny_mllama(folder / "checkpoint")
    buckets = "buckets: {prefill: [16], decode: [1], images: [1, 2]}\n"
    (folder / "c.yaml").write_text(f"checkpoint: checkpoint\nout: a\ncontext: 96\nslots: 1\ntext_before_image: meta\n{buckets}")
    assert main(["compile", "--config", str(folder / "c.yaml")]) == 0
    return folder / "a"


def test_show_tells_of_images_in_the_cache(capsys: pytest.CaptureFixture[str], looking: Path) -> None:
    status, out, _ = run(capsys, "show", looking)
    assert status == 0
    shown_text = " ".join(out.split())
    for text in ("tiles, up to 4 in the grids 1 x 1, 1 x 2,", "2 in a slot, 68 keys each (4 tiles), 2 cross-attention layers"):
        assert text in shown_text
    assert "as in meta" in shown_text
    assert "images" in out
    graphs, forecast = out.split("lower bounds on Ascend 910B")
    assert len([line for line in graphs.splitlines() if "prefill" in line]) == 3
    assert [name for name in forecast.split() if name.startswith("prefill")] == [
        "prefill-16", "prefill-16-images-1", "prefill-16-images-2",
    ]  # fmt: skip


def test_too_many_images_say_how_to_compile(capsys: pytest.CaptureFixture[str], looking: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    message = error(capsys, "generate", looking, "--prompt", "x", *["--image", tmp_path / "red.png"] * 3)
    assert "has 3 images, but the artifact holds 2" in message
    assert "--images 3" in message


def test_bench_asks_about_a_image_in_tiles(capsys: pytest.CaptureFixture[str], looking: Path) -> None:
    status, out, _ = run(capsys, "bench", looking, "--new-tokens", 3, "--repeats", 1)
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert set(result["ttft_ms"]) == {"16", "64"}
    assert result["ttft_picture_ms"] > 0
    assert result["padding_waste"]["vision"] == 0


def test_images_of_a_plan(capsys: pytest.CaptureFixture[str], looking: Path, tmp_path: Path) -> None:
    """A number on the command line wins over the lists of the files, and means one or that many."""
    checkpoint = looking.parent / "checkpoint"
    status, out, _ = run(capsys, "compile", checkpoint, "--out", tmp_path / "a", "--plan-only", "--images", 3)
    assert status == 0
    assert "images  0, 1, 3;" in out
    assert "and 3 images of 68 keys" in out
    config = looking.parent / "c.yaml"
    assert "images  0, 1, 2;" in run(capsys, "compile", "--config", config, "--plan-only")[1]
    assert "images  0, 1;" in run(capsys, "compile", "--config", config, "--plan-only", "--images", 1)[1]
    (tmp_path / "d.yaml").write_text("images: 5\nbuckets: {images: [2]}\n")
    command = ("compile", checkpoint, "--out", tmp_path / "a", "--plan-only", "--config", tmp_path / "d.yaml")
    assert "images  0, 1, 5;" in run(capsys, *command)[1]
    assert "images is 0; expected a positive integer" in error(capsys, *command, "--images", 0)


def test_drafts_of_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ("compile", EMBEDDED, "--out", tmp_path / "a", "--plan-only")
    assert "verify" not in run(capsys, *command)[1]
    assert "  verify  5\n" in run(capsys, *command, "--speculate", 4)[1]
    assert "speculate is 0; expected a number of tokens from 1 on" in error(capsys, *command, "--speculate", 0)


def test_ranks_of_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "compile", EMBEDDED, "--out", tmp_path / "a", "--plan-only", "--tp", 2)
    assert status == 0
    assert "a rank  of 2: weights" in out


def test_chat_on_the_terminal(capsys: pytest.CaptureFixture[str], artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hello", "/image nowhere.png", "look", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, out, err = run(capsys, "chat", artifact, "--max-new-tokens", 3, "--ignore-eos")
    assert status == 0
    assert "nowhere.png" in err
    assert len(out.splitlines()) >= 3


def test_plan_only_writes_nothing(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    status, out, _ = run(capsys, "compile", checkpoint, "--out", tmp_path / "a", "--plan-only", "--context", 128)
    assert status == 0
    assert "4 slots of 128 tokens" in out
    assert not (tmp_path / "a").exists()


def test_config_file_gives_the_options(capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(BUCKETS)
    (tmp_path / "c.yaml").write_text(f"checkpoint: {checkpoint}\nout: a\nbuckets: b.yaml\nslots: 2\n")
    status, out, _ = run(capsys, "compile", "--config", tmp_path / "c.yaml", "--plan-only", "--context", 32)
    assert status == 0
    assert "2 slots of 32 tokens" in out  # the command line wins over the file
    status, _, _ = run(capsys, "compile", "--config", tmp_path / "c.yaml")
    assert status == 0
    assert (tmp_path / "a" / "manifest.json").exists()  # paths are relative to the file


def test_errors_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, artifact: Path, tmp_path: Path
) -> None:
    def yaml(text: str) -> Path:
        (tmp_path / "x.yaml").write_text(text)
        return tmp_path / "x.yaml"

    out = tmp_path / "out"
    assert "unknown keys colour; expected" in error(capsys, "compile", "--config", yaml("colour: 1"))
    assert "no checkpoint was given" in error(capsys, "compile", "--out", out)
    assert "no out was given" in error(capsys, "compile", checkpoint)
    assert "never downloaded" in error(capsys, "compile", "llava-hf/llava-1.5-7b-hf", "--out", out)
    assert "unknown keys prefil;" in error(capsys, "compile", checkpoint, "--out", out, "--buckets", yaml("prefil: [3]"))
    assert "prefill is 3; expected a list" in error(
        capsys, "compile", checkpoint, "--out", out, "--buckets", yaml("prefill: 3")
    )
    assert "prefill is [0]" in error(capsys, "compile", checkpoint, "--out", out, "--buckets", yaml("prefill: [0]"))
    assert "not valid YAML" in error(capsys, "compile", checkpoint, "--out", out, "--buckets", yaml("prefill: [3"))
    assert "nowhere.yaml does not exist" in error(capsys, "compile", checkpoint, "--out", out, "--buckets", "nowhere.yaml")
    assert "has no cross-attention" in error(capsys, "compile", checkpoint, "--out", out, "--images", 2)
    assert "adapter nowhere is not a folder" in error(capsys, "compile", checkpoint, "--out", out, "--lora", "nowhere")
    assert "text before image is 'x'" in error(
        capsys, "compile", checkpoint, "--out", out, "--config", yaml("text_before_image: x")
    )
    assert "holds no manifest.json" in error(capsys, "show", checkpoint)
    long = error(capsys, "generate", artifact, "--prompt", "word " * 80)
    assert "image tokens, and max_new_tokens is 128" in long
    assert "--context" in long
    assert "temperature is -1.0" in error(capsys, "generate", artifact, "--prompt", "x", "--temperature", -1)
    assert "nowhere.png" in error(capsys, "generate", artifact, "--prompt", "x", "--image", "nowhere.png")
    assert "device 'npu' cannot run" in error(capsys, "generate", artifact, "--prompt", "x", "--device", "npu")


def test_checkpoint_errors_are_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "c")
    path = tiny.folder / "config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"model_type": "blip"}, "model_type 'blip' is not supported; supported: llava"),
        ({"mystery": 1}, "unknown keys mystery; they may change the computation"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'; supported: 'gelu'"),
        ({"quantization_config": {}}, "quant_method of the quantisation is None, which is not supported; supported are"),
    ):
        path.write_text(json.dumps({**config, **change}))
        assert message in error(capsys, "compile", tiny.folder, "--out", tmp_path / "a")
    path.write_text(json.dumps({**config, "mystery": 1}))
    assert (
        run(capsys, "compile", tiny.folder, "--out", tmp_path / "a", "--ignore-config-keys", "mystery", "--plan-only")[0] == 0
    )
    path.write_text("{")
    assert "is not valid JSON" in error(capsys, "compile", tiny.folder, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("command", ["compile", "generate", "chat", "show", "verify", "bench", "demo"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"examples:\n  staticvl {command}" in capsys.readouterr().out


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "staticvl.weights.convert", None)
    message = error(capsys, "compile", checkpoint, "--out", tmp_path / "a")
    assert "needs the package" in message
    assert "pip install 'staticvl[compile]'" in message


def test_demo_answers_about_a_real_image(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "demo", "--out", tmp_path / "demo")
    assert status == 0
    assert "box  pixels (" in out
    assert "first token after" in out
    lines = out.splitlines()
    assert lines[0].startswith("This demo compiles a model and runs it")
    assert "removed at the end" not in out
    graphs = len(read_manifest(tmp_path / "demo").graphs)
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(start))
        for start in ("  Part 1", "1. ", f"   Shown: {graphs} graphs, ", "2. ", "   A: ", "   Shown: two answers, ", "3. ")
    ]
    assert places == sorted(places)
    assert "by ONNX Runtime on this processor" in out and str(tmp_path / "demo") in out


# --- How tokens are chosen -----------------------------------------------------------------------------------------------


def given(*args: object) -> SamplingParams:
    return read_sampling(build_parser().parse_args(["generate", "a", "--prompt", "x", *map(str, args)]))


# An option for every setting, with the value that it must become; the dash of --bad-word and others is theirs to know.
GIVEN: dict[str, tuple[tuple[object, ...], object]] = {
    "max_new_tokens": (("--max-new-tokens", 7), 7),
    "min_new_tokens": (("--min-tokens", 3), 3),
    "temperature": (("--temperature", 0.5), 0.5),
    "top_k": (("--top-k", 9), 9),
    "top_p": (("--top-p", 0.8), 0.8),
    "min_p": (("--min-p", 0.1), 0.1),
    "seed": (("--seed", 4), 4),
    "n": (("--n", 2), 2),
    "repetition_penalty": (("--repetition-penalty", 1.3), 1.3),
    "presence_penalty": (("--presence-penalty", -0.2), -0.2),
    "frequency_penalty": (("--frequency-penalty", 0.3), 0.3),
    "logit_bias": (("--logit-bias", "5=-2.5", "--logit-bias", "6=1"), {5: -2.5, 6: 1.0}),
    "stop": (("--stop", "a", "--stop", "b c"), ("a", "b c")),
    "stop_token_ids": (("--stop-token-ids", 5, 6, "--stop-token-ids", 7), (5, 6, 7)),
    "bad_words": (("--bad-word", "a", "--bad-words", "b"), ("a", "b")),
    "ignore_eos": (("--ignore-eos",), True),
    "logprobs": (("--logprobs", 0), 0),
    "json_schema": (("--json-schema", "{}"), "{}"),
    "regex": (("--regex", "a+"), "a+"),
    "choice": (("--choice", "a", "--choice", "b"), ("a", "b")),
    "deadline_s": (("--deadline", 2.5), 2.5),
    "priority": (("--priority", -1), -1),
    "speculate": (("--speculate", 4), 4),
}


def test_every_setting_has_an_option() -> None:
    """And says the same on the command line as in Python; what is not given is left to SamplingParams."""
    assert set(GIVEN) == set(SETTINGS)
    assert given() == SamplingParams()
    for name, (args, value) in GIVEN.items():
        assert given(*args) == SamplingParams(**{name: value}), name


def test_answers_and_their_log_probabilities(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    args = ("generate", artifact, "--prompt", "Hi", "--max-new-tokens", 3, "--ignore-eos", "--n", 2, "--seed", 1)
    args += ("--temperature", 3, "--logprobs", 2)
    status, out, _ = run(capsys, *args, "--json")
    assert status == 0
    answer = json.loads(out)
    assert len(answer["others"]) == 1 and answer["others"][0]["token_ids"] != answer["token_ids"]
    assert [each["token_id"] for each in answer["logprobs"]] == answer["token_ids"]
    assert all(len(each["top"]) == 2 for each in answer["logprobs"])
    lines = run(capsys, *args)[1].splitlines()
    tokens = [line for line in lines if line.startswith("token  ")]
    assert [int(line.split()[1]) for line in tokens] == answer["token_ids"] + answer["others"][0]["token_ids"]
    assert f"{answer['logprobs'][0]['logprob']:.4f}; top-k: {answer['logprobs'][0]['top'][0][0]} " in tokens[0]


@pytest.mark.parametrize("text", ["5", "x=1", "5=", "=1"])
def test_a_bias_that_cannot_be_read(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", "a", "--prompt", "x", "--logit-bias", text])
    assert end.value.code == 2
    assert f"argument --logit-bias: {text!r}; expected a token id and a number, such as 1234=-5" in capsys.readouterr().err


def test_settings_that_cannot_be_used(capsys: pytest.CaptureFixture[str], artifact: Path) -> None:
    ask = ("generate", artifact, "--prompt", "x", "--max-new-tokens", 3)
    assert "n is 0; expected at least 1" in error(capsys, *ask, "--n", 0)
    assert "deadline_s is 0.0; expected a number of seconds above 0" in error(capsys, *ask, "--deadline", 0)
    assert "token 999999 is named in logit_bias or stop_token_ids" in error(capsys, *ask, "--logit-bias", "999999=1")
    assert "speculate is 2, but the artifact verifies at most 0 drafted tokens" in error(capsys, *ask, "--speculate", 2)
    assert "regex and choice were given; expected one of them at most" in error(capsys, *ask, "--regex", "a", "--choice", "b")


MISTYPED = [
    ("generate x --promt hi", "--promt: did you mean --prompt?"),
    ("generate x --promt=hi", "--promt: did you mean --prompt?"),
    ("bench x --requsts a", "--requsts: did you mean --requests?"),
    ("serve x --Prot 3", "--Prot: did you mean --port?"),
    ("show x -jsn", "-jsn: did you mean --json?"),
    ("demo --model lava15", "did you mean llava15?"),
    ("tune-buckets --out x --card 910b", "did you mean 910B?"),
    ("generat x", "did you mean generate?"),
]


@pytest.mark.parametrize(("line", "message"), MISTYPED, ids=[line for line, _ in MISTYPED])
def test_a_mistyped_option_or_value_has_its_near_match(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        build_parser().parse_args(line.split())
    assert capsys.readouterr().err.strip().endswith(message)


@pytest.mark.parametrize("line", ["show x --qqqqqq", "demo --model zzz", "generate x --candidate 3", f"show x --{'js' * 90}"])
def test_a_word_like_no_option_has_no_near_match(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        build_parser().parse_args(line.split())
    message = capsys.readouterr().err
    assert "error" in message
    assert "did you mean" not in message


def test_near_matches_of_a_development_command(capsys: pytest.CaptureFixture[str]) -> None:
    from staticvl.tools.development.ascend_lint import main as lint_main

    with pytest.raises(SystemExit, match=r"^2$"):
        lint_main(["--hlep"])
    assert "--hlep: did you mean --help?" in capsys.readouterr().err
