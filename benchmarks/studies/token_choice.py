"""Host time to choose one token for each row of a batch, from whole logits and from candidates, and the time of onnxruntime to
find the candidates.

    python -m benchmarks.studies.token_choice [--vocab 151936] [--batch 8] [--runs 30] [--candidates 64]

Rows are normal noise with a few likely tokens, as a model's are. Figures are medians, in microseconds a step of the whole
batch; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from staticvl.compiler.emit_onnx import emit
from staticvl.compiler.graphs import GraphDef
from staticvl.runtime.artifact import CANDIDATES, GraphKey, SamplingDefaults, TensorSpec
from staticvl.runtime.sampling.candidates import Candidates
from staticvl.runtime.sampling.logits_processors import logits_processors_for
from staticvl.runtime.sampling.params import SamplingParams
from staticvl.runtime.sampling.sampler import logprob_of, sample
from tests.fakes import text_prompt

PROMPT = 1000  # tokens, for penalties
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 50": SamplingParams(temperature=0.7, top_k=50, seed=1),
    "top-p 0.9": SamplingParams(temperature=0.6, top_p=0.9, seed=1),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
    "min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05, seed=1),
    "greedy, penalties": SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1),
    "greedy, 5 log-probabilities": SamplingParams(temperature=0.0, logprobs=5),
}


def measure(params: SamplingParams, logits: np.ndarray, runs: int) -> float:
    vocab, resolved = logits.shape[1], params.resolved(SamplingDefaults())
    rules = [logits_processors_for(params, text_prompt(*range(PROMPT)), (2,), vocab, ()) for _ in logits]

    def step(position: int) -> None:
        for row, rule in zip(logits, rules, strict=True):
            token = sample(rule.applied(row) if rule else row, resolved, position, vocab)
            if params.logprobs is not None:
                logprob_of(row, token, params.logprobs)
            if rule:
                rule.accept(token)

    return statistics.median(timed(step, position) for position in range(runs)) * 1e6


class Top(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, logits: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.staticvl.top_tokens(logits, inverse_temperature, self.count)


def in_graph(logits: np.ndarray, count: int, temperature: float) -> tuple[Callable[[int], None], Candidates]:
    """A run of a graph that is nothing but the search for candidates, and what it finds."""
    values = {"logits": logits, "inverse_temperature": np.full(len(logits), 1 / temperature, np.float32)}
    inputs = tuple(TensorSpec(name=name, dtype="float32", shape=each.shape) for name, each in values.items())
    shapes = ((len(logits), count), (len(logits), count), (len(logits),))
    dtypes = ("float32", "int32", "float32")
    rows = zip(CANDIDATES, dtypes, shapes, strict=True)
    outputs = tuple(TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in rows)
    data = emit(GraphDef(GraphKey("decode", len(logits)), Top(count), inputs, outputs), {})
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    binding, results = session.io_binding(), [np.empty(spec.shape, spec.dtype) for spec in outputs]
    for bind, specs, arrays in (
        (binding.bind_input, inputs, values.values()),
        (binding.bind_output, outputs, results),
    ):
        for spec, array in zip(specs, arrays, strict=True):
            bind(spec.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return lambda _: session.run_with_iobinding(binding), Candidates(*results)


def measure_candidates(params: SamplingParams, logits: np.ndarray, runs: int, count: int) -> tuple[float, float, int]:
    """Microseconds in the graph and on the host, and how many of all draws the candidates decided."""
    vocab, resolved = logits.shape[1], params.resolved(SamplingDefaults())
    run, candidates = in_graph(logits, count, resolved.temperature or 1.0)
    decided = 0

    def step(position: int) -> None:
        nonlocal decided
        for row in range(len(logits)):
            decided += candidates.choose(row, resolved, position, used=vocab, vocab=vocab) is not None

    graph, host = (statistics.median(timed(each, i) for i in range(runs)) * 1e6 for each in (run, step))
    return graph, host, decided


def timed(function: Callable[[int], None], argument: int) -> float:
    start = time.perf_counter()
    function(argument)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936, help="entries of the vocabulary; default: 151936")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch; default: 8")
    parser.add_argument("--runs", type=int, default=30, help="repetitions; default: 30")
    parser.add_argument("--candidates", type=int, default=64, help="top-k candidates of a row; default: 64")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((args.batch, args.vocab)).astype(np.float32) * 2
    for row in logits:
        row[rng.choice(args.vocab, 40, replace=False)] += np.linspace(18, 6, 40, dtype=np.float32)
    result = {name: round(measure(params, logits, args.runs), 1) for name, params in SETTINGS.items()}
    for name, value in result.items():
        print(f"{name:28} {value:12.1f} us")
    results = {}
    for name in ("greedy", "top-k 50", "top-p 0.9", "temperature 1", "min-p 0.05"):
        graph, host, decided = measure_candidates(SETTINGS[name], logits, args.runs, args.candidates)
        share = decided / (args.runs * args.batch)
        results[name] = {"graph_us": round(graph, 1), "host_us": round(host, 1), "decided": round(share, 4)}
        print(f"{name:28} {graph:12.1f} us in the graph, {host:.1f} us on the host, {share:.1%} decided")
    print(json.dumps({"vocab": args.vocab, "batch": args.batch, "step_us": result, "candidates": results}))


if __name__ == "__main__":
    main()
