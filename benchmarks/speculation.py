"""Gain of drafts: tokens a second with and without them, for text that repeats earlier text and for text that does not.

    python -m benchmarks.speculation [--layers 4] [--quant none] [--tokens 96] [--drafts 4] [--runs 5]

The model is 1B-shaped but for its layers, with random weights. So the answers are forced: a constraint allows one token at each
position. Drafting, verifying and sampling cost what they cost in production. Measured with one request at a time and with four
at once, with and without drafts in turns. Figures are ratios of medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.backends.base import new_feed

from .random_model import compiled

PERIOD = 20  # tokens after which the text that repeats begins again
BATCH = 4


class OneToken:
    """A constraint that lets through one token at each position; see runtime.sampling.logits_processors.Constraint."""

    done = False

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.at = tokens, 0

    def forbid(self, row: Any) -> None:
        logit = row[self.tokens[self.at]]
        row[:] = -np.inf
        row[self.tokens[self.at]] = logit

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.at]
        self.at += 1


def measure_costs(model: runtime.Model) -> dict[str, float]:
    """Milliseconds of text graphs here and now, by which the scheduler is to decide."""
    engine, costs = model.engine, {}
    for graph in engine.manifest.graphs:
        if graph.kind != "vision":
            feed = new_feed(graph)
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                engine.backend.run(graph, feed)
                seconds.append(time.perf_counter() - start)
            costs[graph.name] = round(min(seconds) * 1e3, 2)
            engine.scheduler.costs[graph.graph_key] = costs[graph.name]  # type: ignore[index]
    return costs


def tokens_per_s(model: runtime.Model, answer: list[int], batch: int, drafts: int) -> float:
    """Tokens a second of a batch of equal requests, without prompts."""
    engine = model.engine
    params = runtime.SamplingParams(max_new_tokens=len(answer), temperature=0.0, ignore_eos=True, speculate=drafts)
    prompt = model.processor.prompt("Say it again.")
    sequences = [engine.new_sequence(prompt, params, constraints=(OneToken(answer),)) for _ in range(batch)]
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.generated for sequence in sequences):
        engine.step()
    before, start = sum(len(sequence.generated) for sequence in sequences), time.perf_counter()
    while not engine.scheduler.idle:
        engine.step()
    return (batch * len(answer) - before) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder; default: 4")
    parser.add_argument("--quant", default="none", help="format of the weights; default: none")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer; default: 96")
    parser.add_argument("--drafts", type=int, default=4, help="drafted tokens at once; default: 4")
    parser.add_argument("--runs", type=int, default=5, help="turns of each side; default: 5")
    args = parser.parse_args()
    buckets = Buckets(prefill=(16,), decode=(1, BATCH), verify=(args.drafts + 1,), context=256, slots=BATCH)
    rng = np.random.default_rng(0)
    circle, noise = rng.integers(10, 9000, PERIOD), rng.integers(10, 9000, args.tokens)
    texts = {"repeats": np.resize(circle, args.tokens).tolist(), "does not": noise.tolist()}
    result: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        runtime.load(compiled(Path(folder), args.layers, buckets, args.quant)) as model,
    ):
        result["cost_ms"] = measure_costs(model)
        for batch in (1, BATCH):
            for name, answer in texts.items():
                rates: dict[int, list[float]] = {0: [], args.drafts: []}
                for _ in range(args.runs):
                    for drafts, measured in rates.items():
                        measured.append(tokens_per_s(model, answer, batch, drafts))
                plain, drafted = (statistics.median(measured) for measured in rates.values())
                result[f"batch {batch}, {name}"] = round(drafted / plain, 3)
                print(f"batch {batch}, text {name}: {plain:.1f} tokens/s, with drafts {drafted:.1f}: {drafted / plain:.2f}")
        result["acceptance_rate"] = model.engine.metrics.summary()["acceptance_rate"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
