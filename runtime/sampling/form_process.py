"""The process that compiles grammars first (form_check.py), as the engine's process sees it."""

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
TIMEOUT_S = 60.0  # for an answer, on a busy machine
TOO_COSTLY = "it takes more than {:g} s of processor time or {} MiB to compile, or nests too deeply"


class FormProcess:
    """The process: started by the first grammar, and again by the next one after it has ended; ends with this object. For any
    thread."""

    def __init__(self, seconds: float = PROCESSOR_S) -> None:
        """`seconds`: of processor time that one grammar may take."""
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end = lambda: None

    def problem_of(self, grammar: str) -> str:
        """See form_check.problem_of; also where the process did not survive the grammar.

        Raises OSError or RuntimeError where there is no such process.
        """
        data = grammar.encode()
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            answer = _answer(process, b"%d\n%b" % (len(data), data))
            if answer:
                return json.loads(answer)
            status = None if answer is None else process.wait()
            self._end()
            if status is not None and status >= 0:
                raise RuntimeError(f"the process that compiles grammars ended by itself, with status {status}")
            return TOO_COSTLY.format(self.seconds, MEMORY_BYTES >> 20)

    def _start(self) -> subprocess.Popen[bytes]:
        self._end()
        # -P: modules beside the script must not shadow other packages.
        process = self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of a process that runs out of memory or stack
            start_new_session=True,  # a terminal's Ctrl-C is for the engine's process
        )
        self._end = weakref.finalize(self, _kill, process)
        return process


def _answer(process: subprocess.Popen[bytes], form: bytes) -> bytes | None:
    """The answer to a grammar; empty where the process has ended, None where it takes too long."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(form)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(TIMEOUT_S) else None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with contextlib.suppress(BrokenPipeError):  # of what was not flushed
                pipe.close()
