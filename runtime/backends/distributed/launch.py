"""The worker ranks as processes of this machine, started by rank 0.

They run in sessions of their own, so that a terminal's Ctrl-C reaches rank 0 alone. They end when rank 0 stops
them, when their connection to it ends, or, before there is one, when their standard input does: never later than rank 0,
however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from ...opening import Checks
from ..cores import usable_cores
from .failures import RankError
from .monitor import GRACE_S
from .world import LOOPBACK, STORE_FILE

ENTRY = (sys.executable, "-P", "-m", "staticvl.runtime.backends.distributed")
EXIT_S = 0.5  # seconds for a process that is gone to get an exit status


def threads_each(threads: int | None, local_size: int) -> int:
    """Threads of each rank: as requested, or else this machine's cores split among its ranks."""
    return threads or max(1, usable_cores() // local_size)


class LocalRanks:
    """Ranks 1 .. size - 1, as processes."""

    def __init__(
        self, folder: Path, size: int, store: str, *, device: str, threads: int | None, timeout: float, checks: Checks
    ) -> None:
        """store: the file of the store through which they connect to rank 0."""
        arguments = [str(folder.resolve()), "--device", device, "--timeout", str(timeout)]
        if threads:
            arguments += ["--threads", str(threads)]
        if checks.weights:
            arguments += ["--verify"]
        if checks.key is not None:
            arguments += ["--verify-key", str(checks.key.resolve())]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank in range(1, size):
                self.processes[rank] = subprocess.Popen(
                    [*ENTRY, *arguments],
                    env=_environment(os.environ, rank, size, store, threads_each(threads, size)),
                    stdin=subprocess.PIPE,
                    stdout=2,  # standard output is rank 0's alone
                    start_new_session=True,
                )
        except BaseException:
            self.end()
            raise

    def check(self, ranks: Collection[int]) -> None:
        """Raises RankError when one of these ranks has ended."""
        for rank in ranks:
            if (status := self.processes[rank].poll()) is not None:
                pid = self.processes[rank].pid
                raise RankError(
                    f"rank {rank} (pid {pid}) ended before it was ready ({_exit_text(status)}); see its own message"
                )

    def exit_text(self, rank: int) -> str:
        """The exit status of a rank's ended process, as text; empty where it is not known yet."""
        try:
            return _exit_text(self.processes[rank].wait(EXIT_S))
        except subprocess.TimeoutExpired:
            return ""

    def end(self) -> None:
        """Wait half of GRACE_S for all to end, and kill those that have not."""
        deadline = time.monotonic() + GRACE_S / 2
        for process in self.processes.values():
            if process.stdin:
                process.stdin.close()
        for process in self.processes.values():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()  # a stopped process takes no other signal
        for process in self.processes.values():
            process.wait()


def _environment(env: Mapping[str, str], rank: int, size: int, store: str, threads: int) -> dict[str, str]:
    """The variables that torchrun would set, with a file in place of a port."""
    world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, STORE_FILE: store}
    settings = {"OMP_NUM_THREADS": str(threads)} | dict(env) | {name: str(value) for name, value in world.items()}
    return settings | {"MASTER_ADDR": LOOPBACK}


def _exit_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
