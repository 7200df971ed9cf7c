"""Messages repeat at most 200 characters of what was given, wherever it comes from."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime
from staticvl.compiler.buckets import parse_buckets
from staticvl.compiler.options import Options
from staticvl.runtime.processor.families import family
from staticvl.runtime.sampling.params import SamplingParams
from staticvl.runtime.shown import LONGEST, quoted, shown
from staticvl.tools.cli import main
from staticvl.tools.comparing.thresholds import read_thresholds
from staticvl.tools.questions.read import read_data
from staticvl.weights.source import open_source

from .conftest import REPO

LONG = "long " * 2000
AWAY = "away/" * 700  # longer ones are refused by the system, in its own words, before anything of ours sees them
# Values there are the simulator's own; ascend.py's and ranks' come from cards and peers.
INTERNAL = ("runtime/backends/ascend/", "runtime/backends/ge_simulator/")


def test_both_ends_of_a_long_text_are_shown() -> None:
    assert shown("a" * LONGEST) == "a" * LONGEST
    cut = shown("x" * 5000 + "/folder/name.png")
    assert len(cut) == LONGEST and cut.startswith("xxx") and "..." in cut and cut.endswith("/folder/name.png")
    assert quoted("a'b") == repr("a'b") and len(quoted("y" * 5000)) == LONGEST
    assert shown(Path("a")) == "a" and shown(3) == "3"


def error_calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield node.exc


def test_no_message_repeats_a_value_as_it_is() -> None:
    """repr() in a message is of something that was given: `quoted` bounds it."""
    found, seen = [], 0
    for top in ("runtime", "weights", "compiler", "tools", "model_defs"):
        for path in sorted((REPO / top).rglob("*.py")):
            where = str(path.relative_to(REPO))
            for call in error_calls(path):
                parts = [each for each in ast.walk(call) if isinstance(each, ast.FormattedValue)]
                seen += len(parts)
                found += [
                    f"{where}:{call.lineno}" for each in parts if each.conversion == ord("r") and each.format_spec is None
                ]
    assert seen > 500
    assert [each for each in found if not each.startswith(INTERNAL) and "sampling_options" not in each] == []


def written(folder: Path, text: str) -> Path:
    path = folder / "given"
    path.write_text(text)
    return path


MESSAGES: dict[str, Callable[[Path], Any]] = {
    "artifact": lambda _: runtime.load(AWAY),
    "device": lambda _: Options(checkpoint=Path("x"), out=Path("y"), backend=LONG),
    "bucket key": lambda _: parse_buckets({LONG: 1}, "buckets"),
    "bucket value": lambda _: parse_buckets({"prefill": LONG}, "buckets"),
    "family": lambda _: family(LONG),
    "temperature": lambda _: SamplingParams(temperature=LONG),  # type: ignore[arg-type]
    "tokens": lambda _: SamplingParams(max_new_tokens=LONG),  # type: ignore[arg-type]
    "stop": lambda _: SamplingParams(stop=(LONG, 3)),  # type: ignore[arg-type]
    "data, value": lambda folder: read_data(written(folder, f'"{LONG}"')),
    "data, key": lambda folder: read_data(written(folder, f'{{"{LONG}": 1}}')),
    "data, file": lambda folder: read_data(written(folder, f'{{"prompt": "x", "image": "{LONG[:250]}"}}'), Path(AWAY)),
    "thresholds": lambda folder: read_thresholds(written(folder, f"{{float32: '{LONG}'}}")),
    "thresholds, key": lambda folder: read_thresholds(written(folder, f"'{LONG}': 1")),
    "not YAML": lambda folder: read_thresholds(written(folder, f"'{LONG}")),
    "weights": lambda _: open_source(Path(AWAY)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_short(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as raised:
        MESSAGES[name](tmp_path)
    assert len(str(raised.value)) < 700, str(raised.value)[:1000]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", LONG, "--prompt", "x"],
        ["generate", LONG[:4000], "--prompt", "x"],
        ["generate", "x", "--prompt", "x", "--max-new-tokens", LONG],
        ["generate", "x", "--prompt", "x", "--logit-bias", LONG],
        ["compile", "x", "--out", "y", "--quant", LONG],
        ["compile", LONG, "--out", "y"],
        ["compile", "x", "--out", "y", "--config", LONG],
        ["compare", LONG, "y"],
        ["serve", "x", "--port", LONG],
        ["show", LONG],
        [LONG],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_the_command_line_repeats_nothing_long(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(arguments) == 1
    except SystemExit as end:
        assert end.code == 2
    said = capsys.readouterr().err
    last = said[said.rfind("staticvl") :]
    assert 0 < len(last) < 900 and LONG[:600] not in said, said[-3000:]
