"""How the Makefile installs: which torch, what is said of it, and which Pythons tests run under; by a pip that only notes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import REPO

INSTALL = REPO / "tools" / "development" / "install.sh"
PYTHONS = REPO / "tools" / "development" / "test_pythons.sh"
INDEX = "https://index.invalid/cpu"
(RELEASE,) = re.findall(r"\"torch==([\d.]+)\"", (REPO / "setup.py").read_text(encoding="utf-8"))
FOR_CPUS = f"-m pip install --no-deps --extra-index-url {INDEX} torch=={RELEASE}+cpu"
REST = f"-m pip install --editable {REPO}[compile]"

# Notes its arguments. VERSIONS: what an index has; TORCH_INSTALLED: whether torch is.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
    *"pip index versions"*) echo "Available versions: $VERSIONS" ;;
    *"pip install"*) exit "${INSTALL_STATUS:-0}" ;;
    -c*) [ -n "${TORCH_INSTALLED:-}" ] ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Machine:
    """A folder of commands, and nothing of this machine's GPU or pip."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.python = executable(self.bin / "python", FAKE_PYTHON)
        for name in ("sh", "sed", "head", "dirname", "grep", "cp", "cmp", "mkdir", "cat"):
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.device = folder / "nvidia0"

    def run(self, *command: str | Path, stdin: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {"PATH": self.bin, "HOME": self.folder, "CALLS": self.calls, "NVIDIA_DEVICE": self.device}
        set_here = {"TORCH_INDEX": INDEX, "VERSIONS": f"{RELEASE}+cpu, {RELEASE}, 2.9.0", **environment}
        environment = {name: os.fspath(value) for name, value in paths.items()} | set_here
        return subprocess.run(
            [str(part) for part in command],
            env=environment,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def install(self, **environment: str) -> str:
        done = self.run(INSTALL, self.python, "compile", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def installed(self) -> list[str]:
        return [line for line in self.calls.read_text().splitlines() if "pip install" in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_gpu_torch_for_cpus_comes_first(machine: Machine) -> None:
    said = machine.install()
    assert machine.installed() == [FOR_CPUS, REST]
    assert said == (f"installing torch {RELEASE} (cpu) and the other packages: about 0.3 GB are downloaded, 1.2 GB installed\n")


def test_what_pip_says_is_seen(machine: Machine) -> None:
    """With its progress, of which --quiet would leave nothing."""
    machine.install()
    assert "quiet" not in machine.calls.read_text()
    assert "--quiet --editable" not in (REPO / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("found_by", ["nvidia-smi", "device"])
def test_with_a_gpu_the_usual_torch_comes(machine: Machine, found_by: str) -> None:
    if found_by == "device":
        machine.device.touch()
    else:
        executable(machine.bin / "nvidia-smi", "#!/bin/sh\n")
    assert "(cuda) and the other packages: about 3 GB" in machine.install()
    assert machine.installed() == [REST]


def test_a_driver_without_a_gpu_is_none(machine: Machine) -> None:
    executable(machine.bin / "nvidia-smi", "#!/bin/sh\necho 'No devices found'\nexit 6\n")
    machine.install()
    assert machine.installed() == [FOR_CPUS, REST]


def test_the_user_may_choose(machine: Machine) -> None:
    machine.install(TORCH="cuda")
    assert machine.installed() == [REST]
    machine.calls.unlink()
    machine.device.touch()
    machine.install(TORCH="cpu")
    assert machine.installed() == [FOR_CPUS, REST]
    done = machine.run(INSTALL, machine.python, "compile", TORCH="rocm")
    assert (done.returncode, done.stderr) == (2, "TORCH is rocm; expected cpu, cuda or any\n")


NO_CPU_BUILD = f"no CPU build of torch at {INDEX}; the usual one brings CUDA on x86-64: 3 GB to download, 5 GB installed"


@pytest.mark.parametrize("torch", [{}, {"TORCH": "cpu"}])
@pytest.mark.parametrize("versions", ["", f"{RELEASE}, 2.9.0", "2.9.0+cpu"])
def test_a_script_does_not_install_cuda_unasked(machine: Machine, versions: str, torch: dict[str, str]) -> None:
    done = machine.run(INSTALL, machine.python, "compile", VERSIONS=versions, **torch)
    assert (done.returncode, machine.installed()) == (1, [])
    remedy = "set TORCH=cuda to install that one, or TORCH_INDEX to an index with CPU builds"
    assert done.stderr == f"{NO_CPU_BUILD}; nothing was installed: {remedy}\n"


def test_ci_takes_any_torch(machine: Machine) -> None:
    """Its machine may have no index of CPU builds, and has no terminal: the CPU build where there is one, or else the usual."""
    warning, size = machine.install(TORCH="any", VERSIONS=RELEASE).splitlines()
    assert warning == NO_CPU_BUILD and size.endswith("(cuda) and the other packages: about 3 GB are downloaded, 5 GB installed")
    assert machine.installed() == [REST]
    machine.calls.unlink()
    machine.install(TORCH="any")
    assert machine.installed() == [FOR_CPUS, REST]
    machine.calls.unlink()
    machine.device.touch()
    machine.install(TORCH="any")
    assert machine.installed() == [REST]


@pytest.mark.parametrize(("given", "seen"), [({}, "any"), ({"TORCH": "cpu"}, "cpu")])
def test_ci_sets_it_for_every_target(machine: Machine, tmp_path: Path, given: dict[str, str], seen: str) -> None:
    """By a `make` that notes its targets."""
    executable(machine.bin / "make", '#!/bin/sh\necho "$TORCH $*"\n')
    for name in ("env", "bash"):
        (machine.bin / name).symlink_to(str(shutil.which(name)))
    script = executable(tmp_path / "checkout" / ".ci" / "run", (REPO / ".ci" / "run").read_text(encoding="utf-8"))
    done = machine.run(script, **given)
    assert done.stdout.splitlines() == [f"{seen} {targets}" for targets in ("lint types", "docs", "test")], done.stderr


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("", 1), ("no", 1)])
def test_a_person_is_asked_before_cuda_comes(machine: Machine, answer: str, status: int) -> None:
    keyboard, terminal = os.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    done = machine.run(INSTALL, machine.python, "compile", stdin=terminal, VERSIONS="")
    os.close(keyboard)
    os.close(terminal)
    assert (done.returncode, machine.installed()) == (status, [] if status else [REST])
    assert "Go on? [y/N]" in done.stdout and ("set TORCH_INDEX" in done.stderr) == bool(status)


def test_a_torch_that_is_there_stays(machine: Machine) -> None:
    assert machine.install(TORCH_INSTALLED="yes") == f"torch {RELEASE} is installed already; installing the other packages\n"
    assert machine.installed() == [REST]


def test_a_failed_installation_is_one(machine: Machine) -> None:
    """A broken download of torch for CPUs must not end in the one with CUDA."""
    assert machine.run(INSTALL, machine.python, "compile", INSTALL_STATUS="3").returncode == 3
    assert machine.installed() == [FOR_CPUS]


def test_the_makefile_installs_by_the_script(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    command = ["make", "--dry-run", "--no-print-directory", f"VENV={tmp_path}/venv", "demo"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=True)
    assert f"tools/development/install.sh {tmp_path}/venv/bin/python compile" in done.stdout.splitlines()


# ---- other Pythons

# Makes environments of itself, whose pytest answers STATUS.
FAKE_INTERPRETER = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in
    *version_info*) echo {version} ;;
    *"pip index versions"*) echo "Available versions: $VERSIONS" ;;
    "-m venv "*) mkdir -p "$3/bin"; for each in python pip; do cp "$0" "$3/bin/$each"; done ;;
    "-m pytest"*) exit "${{STATUS:-0}}" ;;
    -c*) exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the script needs, so that environments are made there."""
    folder = tmp_path / "checkout"
    (folder / "tools" / "development").mkdir(parents=True)
    for name in ("setup.py", "tools/development/install.sh", "tools/development/test_pythons.sh"):
        shutil.copy(REPO / name, folder / name)
    return folder


def test_other_pythons_are_tested_or_named(machine: Machine, checkout: Path) -> None:
    executable(machine.bin / "python3.12", FAKE_INTERPRETER.format(version="3.12"))
    script = checkout / "tools" / "development" / PYTHONS.name
    done = machine.run(script, "3.12", "3.13", PYTEST_ARGS="tests/test_x.py -k y")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["tested: 3.12: passed.", "no interpreter (with venv) for: 3.13; not tested"]
    calls = machine.calls.read_text().splitlines()
    assert calls[-1] == ".venv-3.12/bin/python -m pytest tests/test_x.py -k y"
    assert [line for line in calls if line.endswith("[test]")]


def test_an_environment_is_made_once(machine: Machine, checkout: Path) -> None:
    executable(
        machine.folder / ".pyenv" / "versions" / "3.13.1" / "bin" / "python3.13", FAKE_INTERPRETER.format(version="3.13")
    )
    executable(machine.bin / "python3.13", "#!/bin/sh\nexit 127\n")  # a shim that stands for nothing
    script = checkout / "tools" / "development" / PYTHONS.name
    assert machine.run(script, "3.13", STATUS="1").returncode == 1
    machine.calls.unlink()
    done = machine.run(script, "3.13")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "tested: 3.13: passed.")
    assert not [line for line in machine.calls.read_text().splitlines() if "venv " in line or "pip install" in line]
    (checkout / "setup.py").write_text("'torch==9.9.9'")
    machine.run(script, "3.13")
    assert "pip install" in machine.calls.read_text()
