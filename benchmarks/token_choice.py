"""What the host does with the logits of a step: the time to choose one token for each row of a batch.

    python -m benchmarks.token_choice [--vocab 151936] [--batch 8] [--runs 30]

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

from staticvl.runtime.artifact import SamplingDefaults
from staticvl.runtime.logit_rules import rules_for
from staticvl.runtime.sampler import logprob_of, sample
from staticvl.runtime.sampling import SamplingParams
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
    rules = [rules_for(params, text_prompt(*range(PROMPT)), (2,), vocab, ()) for _ in logits]

    def step(position: int) -> None:
        for row, rule in zip(logits, rules, strict=True):
            token = sample(rule.applied(row) if rule else row, resolved, position, vocab)
            if params.logprobs is not None:
                logprob_of(row, token, params.logprobs)
            if rule:
                rule.accept(token)

    return statistics.median(timed(step, position) for position in range(runs)) * 1e6


def timed(function: Callable[[int], None], argument: int) -> float:
    started = time.perf_counter()
    function(argument)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((args.batch, args.vocab)).astype(np.float32) * 2
    for row in logits:
        row[rng.choice(args.vocab, 40, replace=False)] += np.linspace(18, 6, 40, dtype=np.float32)
    result = {name: round(measure(params, logits, args.runs), 1) for name, params in SETTINGS.items()}
    for name, value in result.items():
        print(f"{name:28} {value:12.1f} us")
    print(json.dumps({"vocab": args.vocab, "batch": args.batch, "step_us": result}))


if __name__ == "__main__":
    main()
