"""The commands of docs/howto/ run, with tiny stand-ins for the checkpoint, the image and the files that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from random import Random

import pytest

from staticvl.tools.cli import main
from staticvl.tools.comparing.samples import built_in_samples
from staticvl.tools.drawings import make_drawing, render

from .conftest import EMBEDDED, REPO
from .test_readme import HOW_TO, staticvl_commands

# Not run here: `serve` runs until it is stopped (tests/test_server_process.py starts it); CHECKPOINT stands for a new family.
LEFT_OUT = ("staticvl serve ", "staticvl compile CHECKPOINT ")
FILES = {"trace.csv": "time,prompt_tokens", "questions.jsonl": '{"prompt"', "limits.yaml": "w8a16:"}  # by how they start
CERTIFICATE = REPO / "docs" / "howto" / "read_a_certificate.md"
# Columns that depend on the machine: milliseconds, errors.
ROW = re.compile(r"│ (\w+) +│ +(\d+) │ +[\d.]+ │ +(\d+) │ +[\de.-]+ │ +(\S+) │ +(\S+) │")


def prepare(folder: Path, page: str) -> None:
    """Put what the commands of a page name into a folder: a tiny checkpoint, an image, and the files that the page shows."""
    for name in ("llava-1.5-7b-hf", "tools/assets/tiny_llava15"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(EMBEDDED)
    render(make_drawing(Random(0)), 64).save(folder / "cat.jpg")
    blocks = re.findall(r"^ *```(?:text|yaml)\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    for name, start in FILES.items():
        for block in blocks:
            lines = [line.strip() for line in block.splitlines()]
            if lines[0].startswith(start):
                (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_page(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the commands of a page in a folder; the result says how many ran."""
    page = path.read_text(encoding="utf-8")
    prepare(folder, page)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("staticvl.tools.compare.built_in_samples", lambda seed: built_in_samples(seed)[:2])  # all take long
    commands = [each for each in staticvl_commands(page) if not each.startswith(LEFT_OUT)]
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
    return len(commands)


@pytest.mark.parametrize("path", [path for path in HOW_TO if path != CERTIFICATE], ids=lambda path: path.stem)
def test_commands_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_page(path, tmp_path, monkeypatch) >= (0 if path.stem == "add_a_family" else 4)


def test_the_table_of_the_certificate_page_is_what_show_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apart from times and errors."""
    assert run_page(CERTIFICATE, tmp_path, monkeypatch) == 2
    shown = ROW.findall(CERTIFICATE.read_text(encoding="utf-8"))
    assert len(shown) == 7
    assert shown == ROW.findall(capsys.readouterr().out)
