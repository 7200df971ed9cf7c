"""`staticvl bench`: latency, throughput, memory and padding of an artifact on this machine.

Prompts are random token ids, so that their lengths are exact. Every figure is a median. The last line printed is one JSON
object; times are in milliseconds unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import runtime
from ..runtime.artifact import ModelInfo
from ..runtime.engine.request import Output, SamplingParams
from ..runtime.processor.prompt import CrossAttentionMask, Prompt
from ..runtime.rope import ntk_factor
from .machine import measurement

TEXT_AROUND_IMAGE = 32  # tokens


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: medians over its repeats."""

    batch: int
    prompt_tokens: int
    images: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float  # generated tokens of all rows, over the whole request
    outside_us: float  # microseconds of one decode step outside the backend


def run(args: argparse.Namespace) -> int:
    if args.requests is not None:
        from .bench_requests import run as replay

        return replay(args)
    console = Console(stderr=args.json, highlight=False)
    settings = {"device": args.device, "threads": args.threads, "cache_gb": args.cache_gb}
    with runtime.load(args.artifact, reuse=False, **settings) as model:
        bench = Bench(model, args.new_tokens, args.repeats)
        points = bench.points()
        result = {**bench.summary(args.artifact, points), **measurement(args.threads)}
    if not args.json:
        console.print(table(points))
        waste = ", ".join(f"{kind} {share:.1%}" for kind, share in result["padding_waste"].items())
        console.print(f"padding of what ran: {waste}; memory: {result['memory']['uss_mb']:.0f} MB of its own (USS)")
    print(json.dumps(result))
    return 0


class Bench:
    """Measurements of an artifact at several batch sizes and prompt lengths."""

    def __init__(self, model: runtime.Model, new_tokens: int, repeats: int) -> None:
        if repeats < 1 or new_tokens < 2:
            raise ValueError(f"--repeats is {repeats} and --new-tokens {new_tokens}; expected at least 1 and 2")
        self.model, self.new_tokens, self.repeats = model, new_tokens, repeats
        self.rng = np.random.default_rng(0)
        self.params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    def points(self) -> list[Point]:
        """Prompt lengths at batch 1, batches at a short prompt, and a prompt with an image."""
        manifest = self.model.artifact.manifest
        longest = self.model.engine.capacity - self.new_tokens
        lengths = [n for n in (16, 64, 128, 256, 512, 1024, 2048) if n <= longest] or [longest]
        grid = [(1, n, 0) for n in lengths] + [(b, lengths[0], 0) for b in manifest.buckets("decode") if b > 1]
        image = self._image_prompt()
        image_length = max(image.length, image.image_tokens + TEXT_AROUND_IMAGE)
        if image_length <= longest:
            grid.append((1, image_length, 1))
        return [self.point(*where) for where in tqdm(grid, desc="measuring", disable=None)]

    def point(self, batch: int, prompt_tokens: int, images: int) -> Point:
        self._once(batch, prompt_tokens, images)  # opens the graphs
        runs = [self._once(batch, prompt_tokens, images) for _ in range(self.repeats)]
        return Point(batch, prompt_tokens, images, *(statistics.median(run[i] for run in runs) for i in range(4)))

    def _once(self, batch: int, prompt_tokens: int, images: int) -> tuple[float, float, float, float]:
        engine = self.model.engine
        prompts = [self._prompt(prompt_tokens, images) for _ in range(batch)]
        sequences = [engine.new_sequence(prompt, self.params) for prompt in prompts]
        runs, inside = engine.metrics.runs["decode"], engine.metrics.seconds["decode"]
        started = time.perf_counter()
        outputs: list[Output] = self.model.run(sequences)
        ended = time.perf_counter()
        runs, inside = engine.metrics.runs["decode"] - runs, engine.metrics.seconds["decode"] - inside
        decoding = ended - max(sequence.times.first_token for sequence in sequences)
        return (
            statistics.median(out.timings.first_token_s for out in outputs) * 1e3,
            decoding / runs * 1e3,
            batch * self.new_tokens / (ended - started),
            (decoding - inside) / runs * 1e6,
        )

    def _prompt(self, tokens: int, images: int) -> Prompt:
        """A prompt of random text with `tokens` positions, those of the images at its start included."""
        prompt = self._image_prompt() if images else self._text_prompt()
        return lengthened(prompt, tokens, self.rng, self.model.info)

    def _text_prompt(self) -> Prompt:
        size, none = self.model.info.image.size, np.empty(0, np.int32)
        pixels = np.empty((0, size, size, 3), np.uint8)
        return Prompt(token_ids=none, rows=none, pixels=pixels, frames=(), image_tokens=0, state=none)

    def _image_prompt(self) -> Prompt:
        """A turn with an image alone: random pixels, four wide to three high, several tiles in families that cut images."""
        size = self.model.info.image.size
        image = Image.fromarray(self.rng.integers(0, 256, (size * 3 // 2, size * 2, 3)).astype(np.uint8))
        return self.model.processor.prompt("", image)

    def summary(self, artifact: Path, points: SequenceOf[Point]) -> dict[str, Any]:
        """All measurements as JSON types."""
        metrics = self.model.engine.metrics
        memory = psutil.Process().memory_full_info()
        first = points[0]
        return {
            "artifact": artifact.name,
            "backend": self.model.artifact.manifest.backend,
            "quant": self.model.artifact.manifest.quant,
            "ttft_ms": {str(p.prompt_tokens): round(p.ttft_ms, 3) for p in points if p.batch == 1 and not p.images},
            "ttft_picture_ms": next((round(p.ttft_ms, 3) for p in points if p.images), None),
            "tpot_ms": {str(p.prompt_tokens): round(p.tpot_ms, 4) for p in points if p.batch == 1 and not p.images},
            "tokens_per_s": {str(p.batch): round(p.tokens_per_s, 1) for p in points if p.prompt_tokens == first.prompt_tokens},
            "decode_step_outside_us": round(first.outside_us, 1),
            "decode_step_outside_us_by_batch": {
                str(p.batch): round(p.outside_us, 1) for p in points if p.prompt_tokens == first.prompt_tokens
            },
            "padding_waste": {kind: round(1 - metrics.real[kind] / n, 4) for kind, n in metrics.padded.items() if n},
            "memory": {
                "uss_mb": round(memory.uss / 1e6, 1),
                "pss_mb": round(getattr(memory, "pss", 0) / 1e6, 1),
                "weights_mb": round(sum(w.nbytes for w in self.model.artifact.manifest.weights.values()) / 1e6, 1),
                "cache_mb": round(self.model.artifact.manifest.cache.nbytes / 1e6, 1),
            },
        }


def lengthened(prompt: Prompt, tokens: int, rng: np.random.Generator, info: ModelInfo) -> Prompt:
    """A prompt extended by random text to `tokens` positions; the added ones see the images that its last position sees."""
    more = tokens - prompt.length
    text = rng.integers(3, info.tokenizer.used, more).astype(np.int32)
    cross_attention = prompt.cross_attention and CrossAttentionMask(
        visible=repeat_last(prompt.cross_attention.visible, more), gates=repeat_last(prompt.cross_attention.gates, more)
    )
    return dataclasses.replace(
        prompt,
        token_ids=np.concatenate((prompt.token_ids, text)),
        rows=np.concatenate((prompt.rows, np.full(more, -1, np.int32))),
        state=np.zeros(tokens, np.int32),
        cross_attention=cross_attention,
        ntk=ntk_factor(info.rope, tokens),
    )


def repeat_last(rows: np.ndarray, more: int) -> np.ndarray:
    """Rows followed by `more` copies of the last of them."""
    return np.concatenate((rows, np.repeat(rows[-1:], more, axis=0)))


def table(points: SequenceOf[Point]) -> Table:
    """The measurements as a table."""
    result = Table()
    for column in ("batch", "prompt", "images", "first token ms", "per token ms", "tokens/s", "outside the backend us"):
        result.add_column(column, justify="right")
    for p in points:
        figures = (f"{p.ttft_ms:.2f}", f"{p.tpot_ms:.3f}", f"{p.tokens_per_s:.0f}", f"{p.outside_us:.0f}")
        result.add_row(str(p.batch), str(p.prompt_tokens), str(p.images), *figures)
    return result
