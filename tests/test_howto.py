"""The commands of docs/howto/ run, with tiny stand-ins for the checkpoint, the image and the files that they name."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, field
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


def commands_of(path: Path) -> list[str]:
    """The `staticvl` commands of a page that run here."""
    return [each for each in staticvl_commands(path.read_text(encoding="utf-8")) if not each.startswith(LEFT_OUT)]


@dataclass(frozen=True)
class Artifacts:
    """Copies of what the pages compiled, by the options. Pages repeat each other, and the tiny stand-ins are one checkpoint."""

    folder: Path
    by_options: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def compile(self, arguments: list[str]) -> int:
        """Run a compile command, over a copy where the same was compiled before: then it finds all graphs there."""
        out = Path(arguments[arguments.index("--out") + 1])
        options = tuple(each for each in arguments[2:] if each != str(out))
        if options in self.by_options and not out.exists():
            shutil.copytree(self.by_options[options], out)
        status = main(arguments)
        if status == 0 and options not in self.by_options and "--plan-only" not in options:
            self.by_options[options] = Path(shutil.copytree(out, self.folder / str(len(self.by_options))))
        return status


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


def run_page(path: Path, folder: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands of a page in a folder."""
    prepare(folder, path.read_text(encoding="utf-8"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("staticvl.tools.compare.built_in_samples", lambda seed: built_in_samples(seed)[:2])  # all take long
    for command in commands_of(path):
        arguments = shlex.split(command, comments=True)[1:]
        assert (artifacts.compile if arguments[0] == "compile" else main)(arguments) == 0, command


OTHER_FILES = ("deploy_atlas_800i_a2", "quantise")  # test_howto_deploy.py, test_howto_quantise.py
RUN = [path for path in HOW_TO if path != CERTIFICATE and path.stem not in OTHER_FILES and commands_of(path)]


def test_the_pages_have_commands() -> None:
    assert {path.stem: len(commands_of(path)) for path in RUN} == {"compare": 5, "serve": 4, "tune": 5}


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_commands_run(path: Path, tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(path, tmp_path, artifacts, monkeypatch)


def test_files_that_the_pages_name_exist() -> None:
    """FAMILY stands for a new one."""
    named = {each for path in HOW_TO for each in re.findall(r"\b(?:tests|docs)/[\w/]+\.(?:py|md)", path.read_text("utf-8"))}
    assert len(named) > 8
    assert not [each for each in named if "FAMILY" not in each and not (REPO / each).exists()]


def test_the_table_of_the_certificate_page_is_what_show_prints(
    tmp_path: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Apart from times and errors."""
    run_page(CERTIFICATE, tmp_path, artifacts, monkeypatch)
    shown = ROW.findall(CERTIFICATE.read_text(encoding="utf-8"))
    assert len(shown) == 7
    assert shown == ROW.findall(capsys.readouterr().out)
