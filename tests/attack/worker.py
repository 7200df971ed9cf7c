"""A process that runs attempts one after another and says how each ended; it may hang or crash."""

from __future__ import annotations

import gc
import os
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from .case import Case, Kind, run_attempt

SPACE = 24 << 30  # bytes of address space; more is a MemoryError
TORCH_THREADS = "1"


def main(kind: Kind, folder: Path, log: Path, connection: Connection) -> None:
    """Serve cases of a kind until the connection ends. Standard output and error go to `log`."""
    _redirect(log)
    os.environ.setdefault("OMP_NUM_THREADS", TORCH_THREADS)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with kind.ground(folder) as ground:
        connection.send(("ready", ""))
        base = _counts()
        while True:
            try:
                case: Case = connection.recv()
            except EOFError:
                return
            base = _serve(kind, ground, case, connection, base)


def _serve(kind: Kind, ground: object, case: Case, connection: Connection, base: tuple[int, int]) -> tuple[int, int]:
    attempt = kind.make(ground, case.rng(), case.index)
    connection.send(("what", attempt.what))
    ending, detail = run_attempt(attempt)
    sys.stderr.flush()
    found = _counts()
    if found > base or found[1] > base[1]:
        gc.collect()
        found = _counts()
    if found[0] > base[0] or found[1] > base[1]:
        detail = f"{ending}; file descriptors {base[0]} -> {found[0]}, threads {base[1]} -> {found[1]}; {detail}"
        ending = f"leaves {'file descriptors' if found[0] > base[0] else 'threads'}"
    peak = _peak_mb()
    if peak > kind.memory_mb:
        ending, detail = "takes too much memory", f"{ending}; {peak} MB; {detail}"
    connection.send((ending, detail))
    return max(base[0], found[0]), max(base[1], found[1])


def _counts() -> tuple[int, int]:
    """File descriptors and threads of this process."""
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


def _peak_mb() -> int:
    """The most memory that was resident; getrusage would count that of the process which started this one too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
