"""A rank in which something happens on the way, as a process of its own.

FAULT, e.g. "1 decode 3 SIGKILL": in rank 1, at the third sum of the first decode step, send this process that signal; "raise"
instead of a signal raises an error, "sleep" takes a minute. By itself this file is a worker's entry; with --lead ARTIFACT it
is rank 0's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from staticvl import runtime
from staticvl.runtime.artifact import GraphSpec
from staticvl.runtime.backends.distributed import launch
from staticvl.runtime.backends.distributed.__main__ import main
from staticvl.runtime.backends.distributed.group import GlooGroup
from staticvl.runtime.backends.ort import OrtBackend

SAID = "what a worker rank prints is not printed by its starter"


def arm(rank: int, fault: str) -> None:
    """Wrap what this rank runs, if it is its turn."""
    whose, kind, place, what = fault.split()
    if int(whose) != rank:
        return
    sums, running = 0, ""
    run, all_reduce = OrtBackend.run, GlooGroup.all_reduce

    def watched_run(self: OrtBackend, graph: GraphSpec, feed: Mapping[str, np.ndarray], *where: int) -> np.ndarray:
        nonlocal running
        running = graph.kind
        return run(self, graph, feed, *where)

    def watched_sum(self: GlooGroup, array: np.ndarray) -> None:
        nonlocal sums
        sums += running == kind
        if sums == int(place) and running == kind:
            happen(what)
        all_reduce(self, array)

    changed: Any = (OrtBackend, "run", watched_run), (GlooGroup, "all_reduce", watched_sum)
    for where, name, value in changed:
        setattr(where, name, value)


def happen(what: str) -> None:
    if what == "raise":
        raise OverflowError("a number is too large")
    if what == "sleep":
        time.sleep(60)
    else:
        os.kill(os.getpid(), signal.Signals[what])


def lead(folder: str) -> int:
    """Answer one prompt with all ranks, for long enough to be interrupted; first print the processes of the others. The
    model is left to the end of the interpreter."""
    launch.ENTRY = (sys.executable, __file__)
    model = runtime.load(folder, timeout=20)
    backend: Any = model.engine.backend
    try:
        print("ready", *(peer.pid for peer in backend.monitor.peers.values()), flush=True)
        model.generate("What is in the picture?", max_new_tokens=480, ignore_eos=True)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


if __name__ == "__main__":
    if fault := os.environ.get("FAULT"):
        arm(int(os.environ.get("RANK", "0")), fault)
    if sys.argv[1] == "--lead":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        sys.exit(lead(sys.argv[2]))
    print(SAID, flush=True)
    os._exit(main())
