"""The process of a contestant, as the benchmark holds it."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

import psutil

from .contestants import Contestant
from .sizes import Size

REPO = Path(__file__).parent.parent.parent


CHECKPOINT = "checkpoint"
SPIN_US = "20"  # of staticvl; the peers' cores wait in loops by themselves


def home_of(contestant: Contestant, work: Path) -> Path:
    """The folder for a contestant's own files; no two contestants share one."""
    return work / contestant.runner / contestant.setting


class ContestantError(RuntimeError):
    """A contestant cannot run a command; `skipped` if that was expected."""

    def __init__(self, message: str, *, skipped: bool = False) -> None:
        super().__init__(message)
        self.skipped = skipped


class Process:
    """Works only between a command and its reply."""

    def __init__(self, contestant: Contestant, python: Path, work: Path, size: Size, threads: int) -> None:
        if not python.is_file():
            raise ContestantError(f"{python} is not there; make it with `make bench-peers`", skipped=True)
        self.contestant, self.log = contestant, (work / "log.txt").open("ab")
        home = home_of(contestant, work)
        home.parent.mkdir(exist_ok=True)
        command = [python, "-m", "benchmarks.peers.worker", contestant.runner, contestant.setting]
        command += [work / CHECKPOINT, home]
        self.process = subprocess.Popen(
            [*map(str, command), json.dumps(dataclasses.asdict(size)), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, cwd=REPO, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "STATICVL_SPIN_US": SPIN_US},
        )  # fmt: skip

    def ask(self, do: str, timeout: float = 3600, **arguments: Any) -> dict[str, Any]:
        """One command; raises ContestantError when it fails, when the process ends, or after `timeout` seconds."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise ContestantError(f"{do} took more than {timeout:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContestantError(f"its process ended with status {self.process.wait()} during {do}; see {self.log.name}")
        reply = json.loads(line)
        for reason in ("skipped", "failed"):
            if reason in reply:
                raise ContestantError(reply[reason], skipped=reason == "skipped")
        return reply

    def pss_mb(self) -> float:
        """Memory with every shared page counted by its share."""
        return psutil.Process(self.process.pid).memory_full_info().pss / 1e6

    def end(self) -> None:
        """Close the pipe, which ends the process; one that goes on is killed."""
        assert self.process.stdin and self.process.stdout
        with self.log, self.process.stdout:
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
