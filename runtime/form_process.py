"""The process that compiles forms first (form_check.py), as the engine's process sees it."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
import weakref
from pathlib import Path

from .form_check import MEMORY_BYTES, PROCESSOR_S

SCRIPT = Path(__file__).with_name("form_check.py")
PATIENCE_S = 60.0  # for an answer, on a machine that is busy with other things
TOO_COSTLY = (
    f"it takes more than {PROCESSOR_S:g} s of processor time or {MEMORY_BYTES >> 20} MiB to compile, or nests too deeply"
)


class FormProcess:
    """Started by the first form, and again by the next one after it has ended; ends with this object. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end = lambda: None

    def problem_of(self, grammar: str) -> str:
        """See form_check.problem_of; also where the process did not survive the grammar. Raises OSError if there is none."""
        data = grammar.encode()
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            assert process.stdin and process.stdout
            try:
                process.stdin.write(b"%d\n%b" % (len(data), data))
                process.stdin.flush()
                answer = process.stdout.readline() if _readable(process) else b""
            except BrokenPipeError:
                answer = b""
            if not answer:
                self._end()
                return TOO_COSTLY
            return json.loads(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        # -P: modules of ours stand beside the script, and none of them may take the place of another package.
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of a process that runs out of memory or stack
            start_new_session=True,  # a terminal's Ctrl-C is for the engine's process
        )
        self._end = weakref.finalize(self, _ended, process)
        return process


def _readable(process: subprocess.Popen[bytes]) -> bool:
    assert process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return bool(selector.select(PATIENCE_S))


def _ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):  # of what was not flushed
                pipe.close()
