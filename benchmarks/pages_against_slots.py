"""Requests at once and tokens a second of a card, with a cache in slots and in pages: a replay, nothing is measured.

python -m benchmarks.pages_against_slots TRACE.csv --model FOLDER [--model FOLDER] [--requests 1000] [--images] [--json]

The requests of a trace that fit the context are offered all at once, to the runtime's own scheduler (tools/tuning/replay.py).
Times are lower bounds of a 910B of 64 GB: bytes and operations of the graphs, keys and values as far as they are written, and
KERNEL_US for each of KERNELS kernels a layer. Weights, keys and values take tools/capacity.py's share of the memory.

slots: as many as fit, each as long as the context and, for a model with cross-attention, with one image.
pages: the same memory in blocks of 128 tokens; the youngest request is preempted where they run out. Images of cross-attention
have a pool of their own, whose size is the best of a few. Pages that requests could share are counted once for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from staticvl.compiler.buckets import Buckets
from staticvl.compiler.cost import graph_cost
from staticvl.compiler.graphs import GraphContext, define_graph
from staticvl.compiler.options import Options
from staticvl.compiler.plan import forecast, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.artifact import PAGE_TOKENS, CacheSpec, GraphKey, Kind
from staticvl.tools.capacity import USABLE, image_bytes, token_bytes
from staticvl.tools.cards import CARDS, KERNEL_US
from staticvl.tools.development.ascend_coverage import any_image
from staticvl.tools.tuning.replay import ReplayStats, Setup, replay
from staticvl.tools.tuning.traces import read_trace
from staticvl.tools.tuning.workload import Arrival

CARD, CONTEXT = "910B", 4096
IMAGE_TOKENS = 576  # of an image that is tokens of the prompt
PREFILL, DECODE = (128, 256, 512, 1024), (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
KERNELS = 12  # of a decoder layer (docs/ascend.md)
POOLS = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # images at once that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One replay."""

    model: str
    cache: str
    most: int  # requests that may run at once
    blocks: int | None
    most_running: int
    mean_running: float
    tokens_per_s: float  # of all answers, the time of prompts included
    decode_tokens_per_s: float  # of decode steps alone
    preemptions: int


def arrivals(trace: Path, count: int, *, image_tokens: int, images: int, tiles: int) -> list[Arrival]:
    """The first `count` requests that fit CONTEXT, all at time 0."""
    made: list[Arrival] = []
    for request in read_trace(trace):
        prompt = request.prompt + image_tokens
        if request.generated and prompt + request.generated <= CONTEXT:
            made.append(Arrival(0.0, prompt, request.generated, tiles, images))
        if len(made) == count:
            break
    return made


def outcome(model: str, cache: str, requests: list[Arrival], setup: Setup) -> Outcome:
    stats: ReplayStats = replay(requests, setup)
    tokens = sum(each.generated for each in requests)
    return Outcome(
        model=model,
        cache=cache,
        most=setup.slots,
        blocks=setup.blocks,
        most_running=stats.most_running,
        mean_running=stats.running_s / stats.span_s,
        tokens_per_s=tokens / stats.span_s,
        decode_tokens_per_s=(tokens - len(requests)) / stats.busy_s["decode"],
        preemptions=stats.preemptions,
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes and costs of one model, from its config alone."""

    name: str
    cache: CacheSpec  # of one slot of CONTEXT tokens and one image
    weight_bytes: int
    costs: dict[GraphKey, float]  # with an almost empty cache

    @property
    def crossed(self) -> bool:
        return self.cache.cross is not None


def model_of(folder: Path, *, with_images: bool) -> Model:
    """The model of a folder with a config.json."""
    config = read_config(folder)
    crossed = bool(config.text.cross_layers)
    buckets = Buckets(context=CONTEXT, slots=1, images=(1,) if crossed else None)
    options = Options(checkpoint=folder, out=folder, backend="ascend", dtype="float16", buckets=buckets)
    plan, images = make_plan(config, options), int(with_images and crossed)
    nearly_empty = msgspec.structs.replace(plan.cache, context=16, rows=32, slots=max(DECODE))
    context = GraphContext(config=config, image=any_image(config), cache=nearly_empty)
    overhead_ms = 1e-3 * KERNEL_US * KERNELS * config.text.layers
    sizes: dict[Kind, tuple[int, ...]] = {"prefill": PREFILL, "decode": DECODE}
    costs = {
        GraphKey(kind, size, images): ms + overhead_ms
        for kind, each in sizes.items()
        for size, ms in zip(each, _bounds(context, kind, each, images), strict=True)
    }
    tiles = plan.cache.cross.tiles if plan.cache.cross else 1
    encoder = graph_cost(define_graph(context, GraphKey("vision", tiles)), "float16")
    costs[GraphKey("vision", tiles)] = CARDS[CARD].bound_ms(encoder.flops, encoder.nbytes) + overhead_ms
    return Model(folder.name, plan.cache, forecast(config, plan, options, options.floats({}))["rank_weight_bytes"], costs)


def _bounds(context: GraphContext, kind: Kind, sizes: tuple[int, ...], images: int) -> Iterator[float]:
    """Milliseconds of graphs whose operations and bytes are straight lines in their sizes."""
    ends = (sizes[0], sizes[-1])
    points = [graph_cost(define_graph(context, GraphKey(kind, size, images)), "float16") for size in ends]
    for size in sizes:
        flops, nbytes = (np.interp(size, ends, [getattr(p, name) for p in points]) for name in ("flops", "nbytes"))
        yield CARDS[CARD].bound_ms(round(flops), round(nbytes))


def outcomes(folder: Path, trace: Path, count: int, *, with_images: bool) -> Iterator[Outcome]:
    model, card = model_of(folder, with_images=with_images), CARDS[CARD]
    images, tokens = int(with_images and model.crossed), IMAGE_TOKENS * (with_images and not model.crossed)
    tiles = max(key.bucket for key in model.costs if key.kind == "vision") * with_images
    requests = arrivals(trace, count, image_tokens=tokens + images, images=images, tiles=tiles)
    setup = Setup(model.costs, CONTEXT, 1, read_ms=1e3 * token_bytes(model.cache) / card.bandwidth)
    left = USABLE * card.memory - model.weight_bytes
    slot = model.cache.rows * token_bytes(model.cache) + images * image_bytes(model.cache)
    yield outcome(model.name, "slots", requests, dataclasses.replace(setup, slots=min(int(left // slot), max(DECODE))))
    yield max(_paged(model, requests, setup, left, images), key=lambda each: each.tokens_per_s)


def _paged(model: Model, requests: list[Arrival], setup: Setup, left: float, images: int) -> Iterator[Outcome]:
    for most in POOLS if images else (max(DECODE),):
        blocks = int((left - most * images * image_bytes(model.cache)) // (PAGE_TOKENS * token_bytes(model.cache)))
        if blocks > CONTEXT // PAGE_TOKENS:
            yield outcome(model.name, "pages", requests, dataclasses.replace(setup, slots=most, blocks=blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="the first ones that fit the context; default: 1000")
    parser.add_argument("--model", type=Path, action="append", required=True, help="folder with a config.json; repeat it")
    parser.add_argument("--images", action="store_true", help="an image in every request")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    made = [each for model in args.model for each in outcomes(model, args.trace, args.requests, with_images=args.images)]
    if args.json:
        print(json.dumps(msgspec.to_builtins(made), indent=1))
        return
    Console(width=max(Console().width, 110)).print(_table(made))


def _table(made: list[Outcome]) -> Table:
    table = Table(title=f"{CARD}, float16, context {CONTEXT}, all requests offered at once")
    names = ("model", "cache", "at once, most", "mean", "tokens/s", "of decode steps", "preempted")
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "cache") else "right")
    for each in made:
        figures: list[Any] = [each.most_running, f"{each.mean_running:.1f}", f"{each.tokens_per_s:.0f}"]
        figures += [f"{each.decode_tokens_per_s:.0f}", each.preemptions]
        table.add_row(each.model, each.cache, *map(str, figures))
    return table


if __name__ == "__main__":
    main()
