"""Operator tests in processes of their own: one lowers the cases, others run them on the device.

    python -m staticvl.tools.operator_tests.process lower ARTIFACT FOLDER
    python -m staticvl.tools.operator_tests.process run FOLDER DEVICE FIRST

A process that has imported torch_npu can lower nothing, and an error of a card may leave it unusable for the process that
caused it: after each, the next case runs in a new one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from tqdm import tqdm

from ...runtime.artifact import ArtifactError, open_artifact
from ...runtime.shown import quoted
from .outcome import CASES, REFUSED, LoweredCases, Outcome
from .tolerances import OPERATOR

MARK = "outcome "  # before each line that is one: libraries of a card print lines of their own
UNUSABLE = 3  # the exit status where nothing could be tested
PATIENCE_S = 600.0  # for one case, with the start of its process


class OperatorTestError(RuntimeError):
    """A process that lowers cases and failed; its lines are on stderr."""


def run_operator_tests(artifact: Path, device: str, patience: float = PATIENCE_S) -> list[Outcome]:
    """The outcome of every case of an artifact on a device. A process that ends before its case does, or takes more than
    `patience` seconds for it, counts as refused."""
    with tempfile.TemporaryDirectory(prefix="staticvl-") as name:
        folder = Path(name)
        if status := subprocess.run(_command("lower", artifact, folder), env=_environment(), check=False).returncode:
            raise OperatorTestError(f"the operator tests could not be lowered (status {status}); see the lines above")
        everything = msgspec.json.decode((folder / CASES).read_bytes(), type=LoweredCases)
        outcomes: list[Outcome] = []
        with tqdm(total=len(everything.cases), desc=f"{device}, operators", unit="case", disable=None, file=sys.stderr) as bar:
            while len(outcomes) < len(everything.cases):
                for outcome in _run_from(folder, device, everything, len(outcomes), patience):
                    outcomes.append(outcome)
                    bar.update()
        return outcomes


def _run_from(folder: Path, device: str, everything: LoweredCases, first: int, patience: float) -> Iterator[Outcome]:
    """The outcomes of one process, which starts with the case `first`; at least one."""
    outcomes: list[Outcome] = []
    with subprocess.Popen(
        _command("run", folder, device, str(first)), stdout=subprocess.PIPE, text=True, env=_environment()
    ) as process:
        assert process.stdout is not None
        watch = _Watch(process, patience)
        for line in process.stdout:
            if line.startswith(MARK):
                watch.restart()
                outcomes.append(msgspec.json.decode(line.removeprefix(MARK), type=Outcome))
                yield outcomes[-1]
        watch.stop()
        status = process.wait()
    if status == UNUSABLE:
        raise OperatorTestError(f"device {quoted(device)} could not be opened; see the lines above")
    ended = bool(outcomes) and outcomes[-1].status == REFUSED  # as it should; how it ended then does not matter
    if not ended and first + len(outcomes) < len(everything.cases):
        text = f"no result after {patience:g} s" if watch.expired else f"the process ended with status {status}"
        yield Outcome(everything.cases[first + len(outcomes)].case, REFUSED, OPERATOR[everything.dtype], error=text)


class _Watch:
    """Ends a process that is silent for too long."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.process, self.seconds, self.expired = process, seconds, False
        self.restart()

    def restart(self) -> None:
        self.stop()
        self.timer = threading.Timer(self.seconds, self._expire)
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        if timer := getattr(self, "timer", None):
            timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        self.process.kill()


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", __name__, *map(str, arguments)]


def _environment() -> dict[str, str]:
    """torch loads torch_npu by itself where it is installed, which the simulator must not meet."""
    return {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def main(arguments: Sequence[str]) -> int:
    """What a process does; see above."""
    from ...runtime.backends.ascend.backend import open_device
    from .kernels import lower_artifact, run_folder

    action, *rest = arguments
    try:
        if action == "lower":
            lower_artifact(open_artifact(rest[0]), Path(rest[1]))
            return 0
        for outcome in run_folder(Path(rest[0]), open_device(rest[1])[0], int(rest[2])):
            print(MARK + msgspec.json.encode(outcome).decode(), flush=True)
    except ArtifactError as error:
        print(f"staticvl: {error}", file=sys.stderr)
        return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
