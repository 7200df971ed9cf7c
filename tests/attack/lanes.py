"""Ways to run cases: in a worker process that is replaced when it hangs or crashes, or from here against other processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from . import worker
from .case import Case, Kind, Outcome, run_attempt

READY_S = 300  # a worker may have to compile what it attacks
MAKING_S = 60  # our own part of a case
COMPLAINTS = ("Traceback (most recent call last)", "Exception ignored in", "Exception in thread", "exception in ASGI")


class Lane(Protocol):
    """Raises RuntimeError where the harness itself cannot go on."""

    def attack(self, case: Case) -> Outcome: ...

    def close(self) -> None: ...


class Log:
    """A file that another process writes its standard error to."""

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0
        path.touch()

    def complaint(self) -> str:
        """What was written since the last time, if a traceback is in it."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read().decode(errors="replace")
            self._read = file.tell()
        return text[-2000:] if any(mark in text for mark in COMPLAINTS) else ""

    def tail(self) -> str:
        return self.path.read_text(errors="replace")[-2000:]


class WorkerLane:
    """Cases of one kind in a worker."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.log = Log(folder / f"{kind.name}.log")
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (self.kind, self.folder, self.log.path, theirs)
        self.process = context.Process(target=worker.main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(READY_S) or not self._receive():
            self.close()
            raise RuntimeError(f"the worker of {self.kind.name} did not start: {self.log.tail()}")

    def _receive(self) -> tuple[str, str] | None:
        """None: the worker is gone."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None

    def attack(self, case: Case) -> Outcome:
        started = time.monotonic()
        self.connection.send(case)
        what = self._receive() if self.connection.poll(MAKING_S) else None
        if what is None:
            raise RuntimeError(f"the harness could not make the case {case.name}: {self.log.tail()}")
        if not self.connection.poll(self.kind.limit_s):
            ending, detail = "no end in time", f"more than {self.kind.limit_s:g} s"
        elif (result := self._receive()) is None:
            self.process.join()
            ending, detail = f"the process died: {_status(self.process.exitcode)}", ""
        else:
            ending, detail = result
        if complaint := self.log.complaint():
            ending, detail = "traceback on stderr", f"{ending}; {complaint}"
        outcome = judged(self.kind, case, what[1], ending, detail, time.monotonic() - started)
        if ending.startswith(("no end", "the process died", "takes too much")):
            self.close()
            self._start()
        return outcome

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


class OutsideLane:
    """Cases of one kind from this process, whose ground is made anew after one that was not allowed: it may be changed for
    good. Attempts bound their time themselves."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self._start()

    def _start(self) -> None:
        self._stack = contextlib.ExitStack()
        self.ground = self._stack.enter_context(self.kind.ground(self.folder))

    def attack(self, case: Case) -> Outcome:
        attempt = self.kind.make(self.ground, case.rng(), case.index)
        started = time.monotonic()
        ending, detail = run_attempt(attempt)
        ending, _, more = ending.partition(": ")
        seconds = time.monotonic() - started
        if seconds > self.kind.limit_s and ending in self.kind.endings:
            ending, more = "no end in time", f"{ending}: {more} after {seconds:.1f} s"
        outcome = judged(self.kind, case, attempt.what, ending, more + detail, seconds)
        if not outcome.allowed and not ending.startswith("HTTP"):
            self.close()
            self._start()
        return outcome

    def close(self) -> None:
        self._stack.close()


def judged(kind: Kind, case: Case, what: str, ending: str, detail: str, seconds: float) -> Outcome:
    return Outcome(case, what, ending, detail, seconds, ending in kind.endings)


@contextlib.contextmanager
def lane_of(kind: Kind, folder: Path) -> Iterator[Lane]:
    lane = WorkerLane(kind, folder) if kind.inside else OutsideLane(kind, folder)
    with contextlib.closing(lane):
        yield lane


def _status(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
