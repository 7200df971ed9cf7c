"""Time to first token of a chat's second turn, and of another question about a known image, against fresh prompts.

    python -m benchmarks.studies.second_turn [--hidden 512] [--layers 8] [--repeats 5]

A random LLaVA-1.5 whose images take 576 tokens is compiled for ONNX Runtime. A fresh prompt is the same text and image without
any reuse. Figures are medians in milliseconds of the time from the request to its first token; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions
from tests.checkpoints import tiny_llava
from tests.fakes import noise

BUCKETS = Buckets(prefill=(16, 64, 256), decode=(1, 2), vision=(1,), context=1024, slots=2)
QUESTIONS = ("What is in the picture?", "And what colour has it?")
SETTINGS = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model; default: 512")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder; default: 8")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each prompt; default: 5")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="staticvl-turns-") as folder:
        checkpoint = tiny_llava(
            Path(folder) / "checkpoint", hidden=args.hidden, layers=args.layers, heads=8, kv_heads=8, head_dim=args.hidden // 8,
            intermediate=args.hidden * 11 // 4, context=1024, vision_hidden=256, vision_layers=6, vision_heads=4,
            vision_intermediate=1024, image_size=336, patch_size=14,
        )  # fmt: skip
        artifact = Path(folder) / "artifact"
        build(Options(checkpoint=checkpoint.folder, out=artifact, buckets=BUCKETS))
        model = runtime.load(artifact)
        fresh = runtime.Model(model.artifact, Engine(model.engine.manifest, model.engine.backend, EngineOptions(reuse=False)))
        print(json.dumps(measure(model, fresh, args.repeats)))


def measure(model: runtime.Model, fresh: runtime.Model, repeats: int) -> dict[str, float]:
    turns: list[float] = []
    fresh_turns: list[float] = []
    shared: list[float] = []
    for seed in range(repeats + 1):  # the first opens the graphs
        image = noise(seed, (336, 336))
        with model.chat() as chat:
            first = chat.send(QUESTIONS[0], image, **SETTINGS)
            second = chat.send(QUESTIONS[1], **SETTINGS)
        other = model.generate(QUESTIONS[1], image, **SETTINGS)
        whole = f"USER: <image>\n{QUESTIONS[0]} ASSISTANT: {first.text} USER: {QUESTIONS[1]} ASSISTANT:"
        alone = fresh.generate(whole, image, raw=True, **SETTINGS)
        turns.append(second.timings.first_token_s)
        shared.append(other.timings.first_token_s)
        fresh_turns.append(alone.timings.first_token_s)
    medians = [statistics.median(times[1:]) * 1e3 for times in (turns, shared, fresh_turns)]
    print(f"second turn {medians[0]:.1f} ms, another question {medians[1]:.1f} ms, fresh prompt {medians[2]:.1f} ms")
    return {
        "image_tokens": first.image_tokens,
        "second_turn_ms": round(medians[0], 2),
        "another_question_ms": round(medians[1], 2),
        "fresh_ms": round(medians[2], 2),
        "second_turn_ratio": round(medians[0] / medians[2], 3),
        "another_question_ratio": round(medians[1] / medians[2], 3),
    }


if __name__ == "__main__":
    main()
