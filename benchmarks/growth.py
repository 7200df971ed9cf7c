"""How the time of a run grows with its rows, with the cache and with the prompt, and what bounds it.

    python -m benchmarks.growth ARTIFACT [ARTIFACT ...] --out growth.json --chart growth.svg [--repeats 5] [--threads 2]
    python -m benchmarks.growth --quants w8a8,w4a16 [--layers 4]    # random weights, 1B-shaped but for the layers

Artifacts are measured side by side. Artifacts and points take turns; figures are medians over the turns, and the first turn
does not count. Each time has two lower bounds beside it: the bytes that the run has to read at this machine's memory
bandwidth, and its operations at the best rate that a chunk of the artifact has reached. Weights that fit into the processor's
cache are read faster than memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from staticvl import runtime
from staticvl.compiler.cases import Case, CaseMaker
from staticvl.compiler.plan import Buckets
from staticvl.model_defs.config.stored import decode_config
from staticvl.runtime.artifact import DEFINITION, GraphSpec, is_cached, read_manifest
from staticvl.runtime.backends.cores import usable_cores
from staticvl.runtime.files import write_atomically
from tests.fakes import text_prompt

from .bandwidth import read_gb_per_s
from .growth_chart import draw

SHORT = 64  # tokens in the cache while rows are added
STEPS = 8  # decode steps timed at once
BUCKETS = Buckets(prefill=(64, 256), decode=(1, 2, 4, 8), vision=(1,), context=1024, slots=8)
ONE_TOKEN = runtime.SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
# What is measured, by what grows. The last is no panel of the chart; it reaches the best rate of arithmetic, as a rule.
PANELS = {
    "batch": f"decode step after {SHORT} tokens, by rows",
    "cache": "decode step of one row, by tokens in the cache",
    "prompt": "whole prompt, by its tokens",
    "chunk": "one chunk, by tokens before it",
    "largest": "largest chunk, into an empty cache",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a text graph, with `past` tokens in the cache of each of its rows."""

    graph: GraphSpec
    past: int

    @property
    def rows(self) -> int:
        return self.graph.bucket if self.graph.kind == "decode" else 1

    @property
    def tokens(self) -> int:
        """New tokens of each row, padding included."""
        return 1 if self.graph.kind == "decode" else self.graph.bucket


@dataclass(frozen=True, slots=True)
class LeastWork:
    """What a run has to do at least: a graph's own figures count the whole cache, whatever is in it.

    `rows`: of the cache; `pair_flops`: operations of one token that looks at one key, in all layers together.
    """

    rows: int
    pair_flops: int

    def nbytes(self, run: Run) -> int:
        """Bytes to read: weights and inputs once, and the cache rows in use."""
        cache = sum(spec.nbytes for spec in run.graph.inputs if is_cached(spec.name))
        return run.graph.nbytes - cache + cache * (run.past + run.tokens) // self.rows

    def flops(self, run: Run) -> int:
        """Operations: products, and attention of each token to the tokens visible to it."""
        visible = run.tokens * run.past + run.tokens * (run.tokens + 1) // 2
        return run.graph.flops - run.rows * self.pair_flops * (run.tokens * self.rows - visible)


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of several runs in total."""

    seconds: float
    runs: tuple[Run, ...]


class Side:
    """An open artifact with a full cache."""

    def __init__(self, folder: Path, threads: int) -> None:
        manifest = read_manifest(folder)
        if manifest.backend != "onnx" or manifest.ranks > 1:
            raise SystemExit(f"{folder} was compiled for {manifest.backend}, ranks: {manifest.ranks}; expected onnx, ranks: 1")
        if 1 not in manifest.buckets("decode"):
            raise SystemExit(
                f"{folder} decodes {manifest.buckets('decode')} rows at once; expected a graph of one row among them"
            )
        stored = folder / manifest.tokenizer / DEFINITION
        text = decode_config(stored.read_bytes(), str(stored)).text
        self.name, self.manifest = folder.name, manifest
        self.least = LeastWork(manifest.cache.rows, 4 * text.heads * text.head_dim * manifest.cache.layers)
        self.vocab = manifest.model.tokenizer.used
        self.cases = CaseMaker(manifest.model, self.vocab)
        self.model = runtime.load(folder, threads=threads, reuse=False)
        self._fill()

    def _fill(self) -> None:
        """Fill the cache with noise: unwritten pages would all be one page of zeros, which stays in the processor's cache."""
        widest = self.manifest.graph("decode", max(self.manifest.buckets("decode")))
        full = np.full(widest.bucket, self.manifest.cache.rows, np.int32)
        case = Case("", past=full, count=full)
        self.cases.fill(widest, case, self.cases.feed(widest, case), [self.model.engine.backend])

    def run(self, graph: GraphSpec, past: int, times: int) -> Sample:
        """A graph by itself: tokens before it need not be computed, since time does not depend on what is in the cache."""
        backend, run = self.model.engine.backend, Run(graph, past)
        counts = (np.full(run.rows, count, np.int32) for count in (past, run.tokens))
        feed = self.cases.feed(graph, Case("", *counts))
        backend.run(graph, feed)  # binds the feed, and wakes cores that slept while another artifact ran
        start = time.perf_counter()
        for _ in range(times):
            backend.run(graph, feed)
        return Sample((time.perf_counter() - start) / times, (run,))

    def prompt(self, length: int) -> Sample:
        """A prompt through the engine, in the chunks that it chooses, up to the first token of the answer."""
        engine, runs = self.model.engine, []
        tokens = np.random.default_rng(length).integers(3, self.vocab, length)
        sequence = engine.add_request(text_prompt(*map(int, tokens)), ONE_TOKEN)
        start = time.perf_counter()
        while sequence.finish_reason is None:
            past, step = sequence.computed, engine.step()
            runs.append(Run(engine.graphs[step.graph_key], past))
        return Sample(time.perf_counter() - start, tuple(runs))


@dataclass(slots=True)
class Point:
    """One point of one side's line. `size` is what grows; `tokens` come of the time that is taken."""

    side: Side
    panel: str
    size: int
    tokens: int
    measure: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [sample.seconds for sample in self.samples]

    def flops(self) -> int:
        return sum(map(self.side.least.flops, self.samples[-1].runs))

    def nbytes(self) -> int:
        return sum(map(self.side.least.nbytes, self.samples[-1].runs))


def points_of(side: Side) -> Iterator[Point]:
    """All points to measure of an artifact."""
    manifest, longest = side.manifest, side.manifest.cache.context - 1  # one token more must fit
    for rows in manifest.buckets("decode"):
        graph = manifest.graph("decode", rows)
        yield Point(side, "batch", rows, rows, partial(side.run, graph, min(SHORT, longest), STEPS))
    for past in lengths(longest):
        yield Point(side, "cache", past, 1, partial(side.run, manifest.graph("decode", 1), past, STEPS))
    for length in lengths(longest):
        yield Point(side, "prompt", length, length, partial(side.prompt, length))
    chunk, largest = chunk_of(side), manifest.graph("prefill", manifest.buckets("prefill")[-1])
    for past in dict.fromkeys((0, *lengths(manifest.cache.context - chunk.bucket))):
        yield Point(side, "chunk", past, chunk.bucket, partial(side.run, chunk, past, 1))
    yield Point(side, "largest", 0, largest.bucket, partial(side.run, largest, 0, 1))


def chunk_of(side: Side) -> GraphSpec:
    """The largest chunk bucket of at most half of the context, else the smallest bucket."""
    sizes = side.manifest.buckets("prefill")
    fitting = [size for size in sizes if 2 * size <= side.manifest.cache.context]
    return side.manifest.graph("prefill", max(fitting, default=sizes[0]))


def lengths(most: int) -> list[int]:
    """16, 64, then doubled each time, up to `most`."""
    usual = [16, *(64 << doublings for doublings in range(24))]
    return [*(length for length in usual if length < most), most]


def take_turns(points: Sequence[Point], repeats: int) -> None:
    """Measure all points in turns; points of one size of different artifacts follow each other."""
    order = sorted(points, key=lambda point: (list(PANELS).index(point.panel), point.size))
    with tqdm(total=(repeats + 1) * len(order), unit="point", disable=None) as bar:
        for turn in range(repeats + 1):
            for point in order:
                bar.set_description(f"{point.side.name}, {point.panel} {point.size}")
                sample = point.measure()
                if turn:
                    point.samples.append(sample)
                bar.update()


def as_data(points: Sequence[Point], machine: dict[str, Any]) -> dict[str, Any]:
    """Plain data: by artifact and panel the figures of each point, and how they grow from the first to the last."""
    artifacts = {}
    for side in dict.fromkeys(point.side for point in points):
        own = [point for point in points if point.side is side]
        rate = max(point.flops() / min(point.seconds) for point in own if point.panel in ("chunk", "largest"))
        panels = {name: [_figures(p, rate, machine["read_gb_per_s"]) for p in own if p.panel == name] for name in PANELS}
        artifacts[side.name] = {
            "quant": side.manifest.quant,
            "best_gop_per_s": _short(rate / 1e9),
            "chunk": chunk_of(side).bucket,
            "points": panels,
            "growth": {name: _growth(panel) for name, panel in panels.items() if len(panel) > 1},
        }
    return {"machine": machine, "panels": PANELS, "artifacts": artifacts}


def _figures(point: Point, rate: float, gb_per_s: float) -> dict[str, Any]:
    """`rate`: operations a second. `of_bound`: the larger of both bounds as a part of the time; 1 is as fast as can be."""
    seconds = statistics.median(point.seconds)
    memory, arithmetic = point.nbytes() / gb_per_s / 1e9, point.flops() / rate
    return {
        "size": point.size,
        "ms": _short(1e3 * seconds),
        "tokens_per_s": _short(point.tokens / seconds),
        "spread": round((max(point.seconds) - min(point.seconds)) / seconds, 3),
        "memory_ms": _short(1e3 * memory),
        "arithmetic_ms": _short(1e3 * arithmetic),
        "bound": "memory" if memory >= arithmetic else "arithmetic",
        "of_bound": round(max(memory, arithmetic) / seconds, 3),
        "runs": Counter(run.graph.name for run in point.samples[-1].runs),
    }


def _growth(points: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of each further row or token, and their lower bounds."""
    first, last = points[0], points[-1]
    return {
        f"{name.removesuffix('ms')}us_each": _short(1e3 * (last[name] - first[name]) / (last["size"] - first["size"]))
        for name in ("ms", "memory_ms", "arithmetic_ms")
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def show(console: Console, data: dict[str, Any]) -> None:
    """Print a table for each panel."""
    for panel, title in data["panels"].items():
        table = Table(title=title)
        for column in (
            "artifact",
            "",
            "ms",
            "tokens/s",
            "memory, ms",
            "arithmetic, ms",
            "larger bound",
            "of the time",
            "spread",
        ):
            table.add_column(column, justify="right")
        for name, side in data["artifacts"].items():
            for point in side["points"][panel]:
                cells = [f"{point[key]:.4g}" for key in ("size", "ms", "tokens_per_s", "memory_ms", "arithmetic_ms")]
                table.add_row(name, *cells, point["bound"], f"{point['of_bound']:.0%}", f"{point['spread']:.0%}")
        console.print(table)
    machine = data["machine"]
    console.print(f"memory is read at {machine['read_gb_per_s']} GB/s with {machine['threads']} threads")


def made(folder: Path, layers: int, quants: Sequence[str]) -> list[Path]:
    """Compile artifacts of one model of random weights, without certificates."""
    from .peers.build import build_for_timing  # torch, and so is what the next line imports
    from .random_model import checkpoint_of

    checkpoint = checkpoint_of(layers, folder / "checkpoint")
    for quant in quants:
        build_for_timing(checkpoint, folder / quant, quant, BUCKETS)
    return [folder / quant for quant in quants]


def measure(folders: Sequence[Path], repeats: int, threads: int) -> dict[str, Any]:
    """Measure artifacts; returns plain data."""
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise SystemExit(f"artifacts go by the names of their folders, and some are the same: {', '.join(names)}")
    machine = {"threads": threads, "load": os.getloadavg()[0], "repeats": repeats}
    machine["read_gb_per_s"] = round(read_gb_per_s(threads), 1)
    points = [point for folder in folders for point in points_of(Side(folder, threads))]
    take_turns(points, repeats)
    return as_data(points, machine)


def main() -> None:
    args = _parse()
    with tempfile.TemporaryDirectory(prefix="staticvl-growth-") as name:
        folders = args.artifacts or made(Path(name), args.layers, args.quants.split(","))
        data = measure([folder.resolve() for folder in folders], args.repeats, args.threads)
    show(Console(highlight=False, width=150), data)
    if args.out:
        write_atomically(args.out, json.dumps(data, indent=1).encode())
    if args.chart:
        draw(data).savefig(args.chart)
    print(json.dumps(data))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="*", metavar="ARTIFACT", help="artifacts for ONNX Runtime, of one rank")
    parser.add_argument("--out", type=Path, help="also write the JSON into this file")
    parser.add_argument("--chart", type=Path, help="draw the figures into this file")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each point; default: 5")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    parser.add_argument(
        "--quants",
        default="w8a8,w4a16",
        help="without an artifact: formats to compile, separated by commas; default: w8a8,w4a16",
    )
    parser.add_argument("--layers", type=int, default=4, help="without an artifact: layers of the decoder; default: 4")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; expected at least 1")
    return args


if __name__ == "__main__":
    main()
