"""A rank that another process has started: `python -m staticvl.runtime.backends.distributed ARTIFACT`, with the variables of
torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

from ...opening import Checks
from .start import launcher_store, run_worker
from .world import started_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="staticvl.runtime.backends.distributed")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--verify-key", type=Path)
    args = parser.parse_args()
    world = started_world()
    if world is None:
        parser.error("expected the variables RANK and WORLD_SIZE; this command is for staticvl itself, use torchrun")
    threading.Thread(target=_leave_with_starter, daemon=True).start()
    try:
        store = launcher_store(world)
        options: Any = {"device": args.device, "threads": args.threads, "timeout": args.timeout}
        status, _ = run_worker(args.artifact, world, store, checks=Checks(args.verify, args.verify_key), **options)
        return status
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"staticvl: rank {world.rank}: {error}\n")
        return 1


def _leave_with_starter() -> None:
    """The starter's end of standard input closes when it is gone; joining takes a while to notice that by itself."""
    while sys.stdin.buffer.read(1 << 10):
        pass
    # Messages on the control channel may still be read and answered.
    threading.Event().wait(5.0)
    os._exit(1)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a thread may be left in a collective that never ends
