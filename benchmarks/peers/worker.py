"""The process of a contestant: runs commands from a pipe, a JSON line each way, and sleeps in between.

    python -m benchmarks.peers.worker RUNNER SETTING CHECKPOINT HOME SIZE THREADS

Started with the Python of the environment that has the library. Output that libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .runners.base import Runner, UnsupportedError
from .sizes import Size


class Worker:
    """Times one runner. Every method but `prepare` and `open` answers in seconds, of what its name says."""

    def __init__(self, runner: str, setting: str, checkpoint: Path, home: Path, size: Size, threads: int) -> None:
        self.module = importlib.import_module(f"benchmarks.peers.runners.{runner}")
        self.setting, self.size, self.threads = setting, size, threads
        self.checkpoint, self.home = checkpoint, home
        self.runner: Runner

    def prepare(self) -> dict[str, Any]:
        """Make the files that the library needs; may take minutes. Answers with the libraries' versions."""
        self.module.prepare(self.checkpoint, self.home, self.setting, self.size)
        return {"versions": {name: importlib.metadata.version(name) for name in self.module.VERSIONS}}

    def open(self, tokens: list[int]) -> dict[str, Any]:
        """Open the model and answer a short prompt: the seconds since this process began."""
        self.runner = self.module.OPEN(self.checkpoint, self.home, self.setting, self.size, self.threads)
        self.runner.prefill([tokens])
        return {"seconds": time.time() - _process_began()}

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        return _timed(lambda: self.runner.prefill([tokens]))

    def decode(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Time one decode step of all prompts together."""
        self.runner.prefill(prompts)
        for _ in range(2):
            self.runner.step()
        start = time.perf_counter()
        for _ in range(self.size.steps):
            self.runner.step()
        return {"seconds": (time.perf_counter() - start) / self.size.steps}

    def image(self, side: int) -> dict[str, Any]:
        return _timed(lambda: self.runner.image(_image(side)))

    def image_prompt(self, side: int, tokens: list[int]) -> dict[str, Any]:
        """Time to the first token after an image and text."""
        return _timed(lambda: self.runner.prefill_image(_image(side), tokens))

    def logits(self, tokens: list[int], file: str, side: int = 0) -> dict[str, Any]:
        """Write the logits after a prompt, with an image of that side before it, into a file."""
        if side:
            self.runner.prefill_image(_image(side), tokens)
        else:
            self.runner.prefill([tokens])
        np.save(file, self.runner.last())
        return {}


def _image(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)


def _timed(call: Callable[[], None]) -> dict[str, Any]:
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start}


def _process_began() -> float:
    """Unix time, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner, setting, checkpoint, home, size, threads = sys.argv[1:]
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if worker is None:
                worker = Worker(runner, setting, Path(checkpoint), Path(home), Size(**json.loads(size)), int(threads))
            reply = getattr(worker, command.pop("do"))(**command)
        except UnsupportedError as error:
            reply = {"skipped": str(error)}
        except Exception as error:  # a peer may fail in any way: the others go on, and the report says why
            reply = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
