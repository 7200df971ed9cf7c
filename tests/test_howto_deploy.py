"""The commands of docs/howto/deploy_atlas_800i_a2.md run on the embedded model, with one bucket of each kind, without a card.

Stand-ins: the embedded model for llava-1.5-7b-hf; its drawing for image.png; a folder `models` for /models on the Atlas, and
a copy in Python for rsync. The page itself gives `--device sim` to what it runs before the card. What needs a card, CANN, the
network or another environment is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from staticvl.tools.cli import build_parser, main

from .conftest import EMBEDDED, REPO
from .howto_pages import code_block, run_command, shell_commands, write_small_buckets
from .need_torchair import skip_without_torchair

skip_without_torchair()

PAGE = (REPO / "docs" / "howto" / "deploy_atlas_800i_a2.md").read_text(encoding="utf-8")
NOT_RUN = {  # how a command starts -> why it is not run
    "python3.11 -m venv ": "makes another environment; tests/test_install.py has the installation",
    "venv/bin/pip install ": "installs packages",
    "make ascend-sim": "downloads the wheel of torch_npu, which the tests have already",
    "rsync ": "needs another machine; a copy in Python stands for it",
    "npu-smi ": "needs a card: it lists the cards",
    "source /usr/local/Ascend/": "needs CANN",
    'venv/bin/python -c "import torch, torch_npu': "needs CANN: torch_npu cannot be imported without it",
    "python -m staticvl.tools.ascend_acceptance ": "needs a card: it compares the card with the simulator",
    "staticvl serve ": "needs a card; tests/test_server_process.py starts a server",
    "curl ": "needs that server",
    "export HCCL_": "needs several cards",
    "torchrun ": "needs several cards, and HCCL",
}
SLOW = "staticvl compare "


def run_here() -> list[str]:
    return [each for each in shell_commands(PAGE) if not each.startswith(tuple(NOT_RUN))]


def copy_to_the_atlas(folder: Path) -> None:
    """What rsync does on the page: the folder without .host/, and the public key."""
    artifact = folder / "llava-7b-npu"
    shutil.copytree(artifact, folder / "models" / artifact.name, ignore=shutil.ignore_patterns(".host"))
    shutil.copy(folder / "release.key.pub", folder / "models")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the page names."""
    (tmp_path / "llava-1.5-7b-hf").symlink_to(EMBEDDED)
    (tmp_path / "image.png").symlink_to(EMBEDDED.parent / "shapes.png")
    (tmp_path / "buckets.yaml").write_text(code_block(PAGE, "prefill:"), encoding="utf-8")
    write_small_buckets(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_runs_or_has_a_reason() -> None:
    commands = shell_commands(PAGE)
    assert [each.split()[1] for each in run_here()] == "compile compile show verify generate compare sign sign verify".split()
    assert not [each for each in run_here() if not each.startswith("staticvl ")]
    assert not [start for start in NOT_RUN if not any(each.startswith(start) for each in commands)]


def test_commands_of_the_card_have_its_options() -> None:
    """As far as they are commands of staticvl."""
    served = [each.partition("staticvl.tools.cli ")[2] or each.removeprefix("staticvl ") for each in shell_commands(PAGE)]
    parsed = [build_parser().parse_args(shlex.split(each)) for each in served if each.startswith("serve ")]
    assert [(each.artifact.name, each.device) for each in parsed] == [("llava-7b-npu", "npu"), ("llava-7b-npu-tp4", "npu")]


def test_the_buckets_of_the_page_can_be_compiled(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [each for each in run_here() if "--buckets buckets.yaml" in each]
    assert main([*shlex.split(command)[1:], "--plan-only"]) == 0
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    buckets = yaml.safe_load((place / "buckets.yaml").read_text(encoding="utf-8"))
    for kind in ("prefill", "decode", "vision"):
        assert [int(each.strip(",")) for each in printed[kind]] == buckets[kind]


def test_commands_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in run_here():
        if command.startswith(SLOW):
            continue
        if "/models/" in command:
            copy_to_the_atlas(place)
        assert run_command(command.replace("/models/", "models/")) == 0, command
    printed = capsys.readouterr().out
    assert "A red circle at the top right" in printed  # generate, by the simulator
    assert "models/llava-7b-npu" in printed


@pytest.mark.slow
def test_slow_commands_run(place: Path) -> None:
    compiled = run_here()[1]
    (compared,) = [each for each in run_here() if each.startswith(SLOW)]
    assert [run_command(compiled), run_command(compared)] == [0, 0]
    assert "<html" in (place / "report.html").read_text(encoding="utf-8")
