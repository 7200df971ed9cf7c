"""Cost of running as ranks, beside the graphs themselves.

    python -m benchmarks.rank_latency ARTIFACT [--tokens 200]

Medians over the decode steps of one prompt, in microseconds, in rank 0. The last line is JSON, with these keys:

step: the whole step; outside: scheduling, feeds, sampling; around: what ranks add to the graph (handing it to the worker
thread, and the messages to the other ranks); message: the messages alone; sum: one sum of a hidden state among all ranks,
waiting for the slowest included; sums: how many sums a step has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from staticvl import runtime
from staticvl.runtime.artifact import Collective
from staticvl.runtime.backends.distributed.group import GlooGroup

PROMPT = "What is in the picture?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="artifact of at least two ranks")
    parser.add_argument("--tokens", type=int, default=200, help="decode steps; default: 200")
    args = parser.parse_args()
    with runtime.load(args.artifact) as model:
        if model.artifact.manifest.tp == 1:
            raise SystemExit(f"{args.artifact} was compiled for tp=1, where nothing is summed; compile it with --tp 2 or more")
        print(json.dumps(measure(model, args.tokens)))


def measure(model: runtime.Model, tokens: int) -> dict[str, Any]:
    backend: Any = model.engine.backend
    manifest = model.artifact.manifest
    spans: dict[str, list[float]] = {}
    timed(model.engine, "step", "step", spans)
    timed(backend, "run", "backend", spans)
    timed(backend.local, "run", "graph", spans)
    timed(backend.monitor, "send", "message", spans)
    timed(GlooGroup, "all_reduce", "sum", spans)
    for count in (4, tokens):  # what the first binds is not measured
        model.generate(PROMPT, max_new_tokens=count, ignore_eos=True)
    graph = manifest.graph("decode", manifest.buckets("decode")[0])
    sums = sum(isinstance(step, Collective) and step.op == "all_reduce" for step in graph.plan)
    steps = tokens - 1  # the first token is prefill's
    last = {name: span[-steps * sums :] if name == "sum" else span[-steps:] for name, span in spans.items()}
    median = {name: statistics.median(span) * 1e6 for name, span in last.items()}
    around = [whole - graph for whole, graph in zip(last["backend"], last["graph"], strict=True)]
    outside = [whole - inside for whole, inside in zip(last["step"], last["backend"], strict=True)]
    return {
        "ranks": manifest.tp,
        "sums": sums,
        "step_us": round(median["step"], 1),
        "outside_us": round(statistics.median(outside) * 1e6, 1),
        "around_us": round(statistics.median(around) * 1e6, 1),
        "message_us": round(median["message"], 1),
        "sum_us": round(median["sum"], 1),
    }


def timed(where: Any, name: str, span: str, spans: dict[str, list[float]]) -> None:
    """Wrap a method so that the time of each call is recorded."""
    call: Callable[..., Any] = getattr(where, name)
    seconds = spans.setdefault(span, [])

    def measured(*args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(where, name, measured)


if __name__ == "__main__":
    main()
