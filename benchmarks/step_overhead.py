"""Cost of the runtime itself per decode step: scheduler, feeds and the rest, at several batch sizes.

    python -m benchmarks.step_overhead [--batches 1,8,32] [--steps 2000]

The device is a stub that returns fixed logits at once. Figures are medians, in microseconds a step; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from staticvl.runtime.artifact import Artifact, GraphSpec
from staticvl.runtime.backends.base import Result
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.request import SamplingParams
from tests.fakes import fake_artifact, text_prompt

CONTEXT = 4096
ROOM = 64  # positions of prompts


class Stub:
    """A device that takes no time; see runtime.backends.base.Backend."""

    def __init__(self, artifact: Artifact) -> None:
        shapes = {g.name: g.outputs[0].shape for g in artifact.manifest.graphs}
        self.results = {name: Result(np.zeros(shape, np.float32).__getitem__) for name, shape in shapes.items()}

    def run(self, graph: GraphSpec, feed: Any, slot: int = 0, image: int = 0) -> Result:
        return self.results[graph.name]

    def load(self, graph: GraphSpec) -> None: ...

    unload = read_cache = write_cache = copy_slot = copy_page = give_back = use_small_pages = load  # type: ignore[assignment]


def timed(calls: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its seconds are recorded."""

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        calls.append(time.perf_counter() - start)
        return result

    return call


def measure(batch: int, steps: int) -> dict[str, float]:
    artifact = fake_artifact(slots=batch, context=CONTEXT, prefill={16: 1.0, 64: 2.0}, decode={batch: 1.0})
    engine = Engine(artifact.manifest, Stub(artifact))  # type: ignore[arg-type]
    parts: dict[str, list[float]] = {"scheduler": [], "feeds": [], "step": []}
    params = SamplingParams(max_new_tokens=steps + 1, temperature=0.0, ignore_eos=True)
    for row in range(batch):
        engine.add_request(text_prompt(*range(row, row + ROOM)), params)
    while any(sequence.prefilling for sequence in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step()
    engine.scheduler.next_step = timed(parts["scheduler"], engine.scheduler.next_step)  # type: ignore[method-assign]
    engine.feeds = timed(parts["feeds"], engine.feeds)  # type: ignore[assignment]
    step = timed(parts["step"], engine.step)
    while not engine.scheduler.idle:
        step()
    return {name: round(statistics.median(calls) * 1e6, 1) for name, calls in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,8,32", help="batch sizes, separated by commas; default: 1,8,32")
    parser.add_argument("--steps", type=int, default=2000, help="decode steps; default: 2000")
    args = parser.parse_args()
    result = {}
    for batch in map(int, args.batches.split(",")):
        result[str(batch)] = figures = measure(batch, args.steps)
        print(f"batch {batch}: " + ", ".join(f"{name} {value} us" for name, value in figures.items()))
    print(json.dumps({"decode_step_us_by_batch": result}))


if __name__ == "__main__":
    main()
