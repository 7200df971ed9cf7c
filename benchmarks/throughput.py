"""Tokens a second of several requests at once against one at a time, and what bounds them.

    python -m benchmarks.throughput [--artifact DIR | --layers 8] [--quant w8a8] [--requests 8] [--tokens 128] [--runs 3]

Without an artifact two models are measured: the embedded tiny model, and one of random weights, 1B-shaped but for its layers,
with the given quantisation. Equal requests are answered one after another and then all at once, in turns; figures are medians.
`inside` is the share of the time that the backend computed, by graph kind. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import Manifest

from .random_model import compiled

EMBEDDED = Path(__file__).parent.parent / "tools" / "assets" / "tiny_llava15"
PROMPTS = [f"Question {number}: what is to be said about it?" for number in range(64)]


def measure(folder: Path, requests: int, tokens: int, runs: int) -> dict[str, Any]:
    with runtime.load(folder, reuse=False) as model:
        alone, together = [], []
        settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        prompts = PROMPTS[:requests]
        model.generate(prompts, **{**settings, "max_new_tokens": 2})
        model.generate(prompts[0], **{**settings, "max_new_tokens": 2})
        for _ in range(runs):
            alone.append(timed(lambda: [model.generate(prompt, **settings) for prompt in prompts]))
            before, start = dict(model.engine.metrics.seconds), time.perf_counter()
            together.append(timed(lambda: model.generate(prompts, **settings)))
            spent = time.perf_counter() - start
        seconds = model.engine.metrics.seconds
        inside = {kind: round((s - before[kind]) / spent, 3) for kind, s in seconds.items() if s > before[kind]}
        count = requests * tokens
        return {
            "one_at_a_time_tokens_s": round(count / statistics.median(alone), 1),
            "at_once_tokens_s": round(count / statistics.median(together), 1),
            "ratio": round(statistics.median(alone) / statistics.median(together), 2),
            "inside": inside,
            "decode_ms": costs(model.engine.manifest),
        }


def costs(manifest: Manifest) -> dict[int, float]:
    """Milliseconds of a decode step by rows, as measured when it was compiled."""
    return {graph.bucket: graph.cost_ms for graph in manifest.graphs if graph.kind == "decode"}


def timed(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", type=Path, help="artifact to measure; default: two models, see above")
    parser.add_argument("--layers", type=int, default=8, help="without an artifact: layers of the decoder; default: 8")
    parser.add_argument("--quant", default="w8a8", help="without an artifact: format of the weights; default: w8a8")
    parser.add_argument("--requests", type=int, default=8, help="requests at once; default: 8")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer; default: 128")
    parser.add_argument("--runs", type=int, default=3, help="turns of each side; default: 3")
    args = parser.parse_args()
    buckets = Buckets(prefill=(16, 64), decode=(1, args.requests), context=256, slots=args.requests)
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.artifact:
            models = {args.artifact.name: args.artifact}
        else:
            build(Options(checkpoint=EMBEDDED, out=folder / "tiny", buckets=buckets, quant=args.quant))
            random = compiled(folder / "random", args.layers, buckets, args.quant)
            models = {"tiny": folder / "tiny", f"1B-shaped, {args.layers} layers, {args.quant}": random}
        for model, artifact in models.items():
            result[model] = figures = measure(artifact, args.requests, args.tokens, args.runs)
            print(f"{model}: {figures}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
