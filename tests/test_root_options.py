"""What `staticvl` prints without a command: its version, and scripts that complete commands in a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import staticvl
from staticvl.tools.cli import main


def exits(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as raised:
        main(list(args))
    assert isinstance(raised.value.code, int)
    return raised.value.code, *capsys.readouterr()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(capsys, "--version") == (0, f"staticvl {staticvl.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("ver", {"verify"}),
        ("verify --k", {"--key"}),
        ("demo --model ll", {"llava15", "llava16"}),
        ("show some", {"some-folder"}),
    ],
)
def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, expected: set[str]) -> None:
    """Commands, options, their choices, and names of files."""
    status, script, _ = exits(capsys, "--completion", "bash")
    assert status == 0
    (tmp_path / "some-folder").mkdir()
    position = len(words.split())
    ask = (
        f"COMP_WORDS=(staticvl {words}) COMP_CWORD={position}\n_shtab_staticvl staticvl\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    done = subprocess.run(["bash", "-c", script + "\n" + ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == expected


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_other_shells(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    status, script, _ = exits(capsys, "--completion", shell)
    assert status == 0 and "tune-buckets" in script and "request-log" in script


def test_completion_without_its_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = exits(capsys, "--completion", "bash")
    assert (status, out) == (1, "")
    assert err == "staticvl: --completion needs the package shtab; pip install 'staticvl[completion]'\n"
