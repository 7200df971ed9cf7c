"""The commands of docs/howto/quantise.md run on the embedded model, with one bucket of each kind.

Stand-ins: the embedded model for llava-1.5-7b-hf; a drawing for a.jpg; questions and answers that this model knows for
questions.jsonl. prompts.jsonl and limits.yaml are those of the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from staticvl.tools.drawings import make_drawing, render

from .conftest import EMBEDDED, REPO
from .howto_pages import code_block, run_command, shell_commands, write_small_buckets

PAGE = (REPO / "docs" / "howto" / "quantise.md").read_text(encoding="utf-8")
IN_4_BITS = "compile llava-1.5-7b-hf --out llava-7b-w4"
# The compilation without calibration, the 8-bit cache and the report; tests/test_howto.py has fast ones like them.
SLOW = ("--out llava-7b-w8a8 --quant w8a8", "show llava-7b-w8a8", "--out llava-7b-kv8", "--report report.html")
QUESTIONS = {
    "What is in the picture?": "A red circle at the top right, a blue square at the bottom left and a black triangle "
    "at the bottom right.",
    "How many shapes are there?": "There are three shapes.",
    "Where is the red circle?": "At the top right.",
}


def commands(*, slow: bool) -> list[str]:
    """Those of the page in their order; the slow ones need the artifact in 4 bits as well."""
    every = shell_commands(PAGE)
    chosen = [each for each in every if any(part in each for part in SLOW) and "--plan-only" not in each]
    return [each for each in every if IN_4_BITS in each or each in chosen] if slow else [e for e in every if e not in chosen]


def prepare(folder: Path) -> None:
    """Write what the page names."""
    (folder / "llava-1.5-7b-hf").symlink_to(EMBEDDED)
    render(make_drawing(Random(0)), 64).save(folder / "a.jpg")
    (folder / "shapes.png").symlink_to(EMBEDDED.parent / "shapes.png")
    (folder / "prompts.jsonl").write_text(code_block(PAGE, '{"prompt"'), encoding="utf-8")
    (folder / "limits.yaml").write_text(code_block(PAGE, "w4a16:"), encoding="utf-8")
    questions = [{"prompt": each, "images": ["shapes.png"], "answer": answer} for each, answer in QUESTIONS.items()]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(each) for each in questions), encoding="utf-8")
    write_small_buckets(folder)


def run_commands(chosen: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(folder)
    monkeypatch.chdir(folder)
    for command in chosen:
        assert run_command(command) == 0, command


def test_every_command_is_run() -> None:
    """By one of the two tests below, or by both."""
    fast, slow = commands(slow=False), commands(slow=True)
    assert (len(fast), len(slow)) == (3, 5)
    assert {*fast, *slow} == set(shell_commands(PAGE))


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the limits of the page, which the model in 4 bits keeps."""
    run_commands(commands(slow=False), tmp_path, monkeypatch)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["passed"] and len(result["samples"]) == len(QUESTIONS)
    assert (result["limits"]["kl"], result["limits"]["agreement"]) == (0.05, 0.95)


@pytest.mark.slow
def test_slow_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_commands(commands(slow=True), tmp_path, monkeypatch)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
