"""`staticvl compile`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from ..compiler.build import Report, build
from ..compiler.choices import DTYPES
from ..compiler.inputs import Preview, plan_only
from ..compiler.options import Options
from ..compiler.plan import Plan
from ..runtime.artifact import KINDS
from .artifact_facts import cache_form
from .capacity import Capacity, capacity, image_tokens
from .cards import CARDS, Card
from .compile_options import read_options
from .progress import TerminalProgress
from .show import capacity_table


def run(args: argparse.Namespace) -> int:
    options = read_options(args)
    if args.plan_only:
        memory = CARDS[args.card].memory if args.memory_gb is None else 1e9 * args.memory_gb
        _print_preview(plan_only(options), CARDS[args.card], memory)
        return 0
    started = time.perf_counter()
    report = build(options, TerminalProgress())
    _print_report(report, options.out, time.perf_counter() - started)
    return 0


def _print_preview(preview: Preview, card: Card, memory: float) -> None:
    _print_graphs(preview.plan)
    _print_sizes(preview)
    Console(highlight=False).print(capacity_table(_capacity(preview, card, memory)))
    _print_notes(preview.notes)


def _print_graphs(plan: Plan) -> None:
    for kind in KINDS:
        if buckets := plan.buckets(kind):
            print(f"{kind:>8}  {', '.join(map(str, buckets))}")
    if plan.cache.cross:
        numbers = sorted({graph.images for graph in plan.graphs if graph.kind != "vision"})
        print(f"  images  {', '.join(map(str, numbers))}; prefill and decode graphs for each")


def _print_sizes(preview: Preview) -> None:
    options, cache, sizes = preview.options, preview.plan.cache, preview.sizes
    images = f" and {cache.cross.images} images of {cache.cross.rows} keys" if cache.cross else ""
    bits = " (int8)" if cache.text_dtype else ""
    print(f"   cache  {cache_form(cache)}{images}, {sizes['cache_bytes'] / 1e9:.3f} GB{bits}")
    weights = f"{sizes['weight_bytes'] / 1e9:.3f} GB ({_form(options)})"
    print(f" weights  {sizes['parameters'] / 1e9:.3f} billion parameters, {weights}")
    if options.tp * options.pp > 1:
        print(f"  a rank  of {options.tp * options.pp}: {_both(sizes['rank_weight_bytes'], sizes['rank_cache_bytes'])}")
        print(f"          in bfloat16: {_both(sizes['rank_bfloat16_bytes'], sizes['rank_bfloat16_cache_bytes'])}")


def _capacity(preview: Preview, card: Card, memory: float) -> Capacity:
    """What a device holds beside the weights of one rank."""
    config, cache = preview.config, preview.plan.cache
    tokens = image_tokens(config.vision.rows_per_tile, config.grids, crossed=cache.cross is not None)
    return capacity(cache, tokens, preview.sizes["rank_weight_bytes"], card, memory)


def _both(weights: int, cache: int) -> str:
    """Bytes of both."""
    return f"weights {weights / 1e9:.3f} GB, cache {cache / 1e9:.3f} GB"


def _form(options: Options) -> str:
    floats = "the checkpoint's dtypes" if options.dtype == "auto" else options.dtype or DTYPES[options.backend][0]
    if options.stored_quant == "none":
        return floats
    table = "" if options.dtype or options.backend == "ascend" else ", but the embedding table as in the checkpoint"
    return f"{options.quant}, the rest in {floats}{table}"


def _print_report(report: Report, out: Path, seconds: float) -> None:
    weights = "converted" if report.converted else "unchanged"
    total = sum(spec.nbytes for spec in report.manifest.files.values())
    print(
        f"{out}: {len(report.traced)} graphs compiled, {len(report.reused)} unchanged, weights {weights}, "
        f"{total / 1e6:.1f} MB, {seconds:.1f} s"
    )
    _print_notes(report.manifest.build.notes or ())


def _print_notes(notes: Iterable[str]) -> None:
    """Notes on settings of a checkpoint that contradict each other or are not used."""
    for note in notes:
        print(f"note: {note}")
