"""`staticvl tune-buckets`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

from rich.console import Console

from ..runtime.files import write_atomically
from ..runtime.shown import quoted, shown
from .cards import CARDS
from .ready import require
from .tuning.arrivals import offered_load, rate_of, with_times
from .tuning.choose import TuningResult, choose
from .tuning.columns import Request
from .tuning.comparison import coverages, reasons, replay_powers_of_two
from .tuning.costs import costs_yaml, parse_costs
from .tuning.curves import CostError
from .tuning.images import ImageCounter
from .tuning.limits import Limits
from .tuning.reading import Reading, parse_columns
from .tuning.report import buckets_yaml, chosen_table, coverage_table, frontier_table, reason_table, replay_table, slots_table
from .tuning.target import CPU, Target, from_artifact, from_checkpoint
from .tuning.time_units import TimeReader, load_note
from .tuning.trace_error import TraceError
from .tuning.traces import parse_distribution, random_requests, read_trace
from .tuning.workload import Workload, gather
from .yaml_file import read_yaml

RANDOM_REQUESTS = 20_000  # drawn from a distribution
DEFAULT_MODEL = "llava-1.5-7b-hf"
DEFAULT_CARD = "910B"
_BUSY = 0.98  # the share of time above which requests wait longer and longer


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if args.report:
        require("matplotlib")
    _check(args)
    limits, target = _limits(args), _target(args)
    reading = Reading(TimeReader(args.time_unit), parse_columns(args.columns), args.skip_bad_rows)
    workload = _workload(args, target, reading)
    result = choose(workload, target, limits)
    powers, coverage = replay_powers_of_two(result, args.granularity), coverages(result, args.granularity)
    cost_ms = {kind: 1e3 * seconds / len(workload.block) for kind, seconds in result.replayed.busy_s.items()}
    cost_ms |= {"prefill": coverage[0].ms}
    tables = [chosen_table(result), coverage_table(coverage), frontier_table(result), replay_table(powers, result.replayed)]
    if result.slots_tried:
        tables.insert(3, slots_table(result))
    if args.explain or args.report:
        tables.append(reason_table(reasons(result), cost_ms))
    notes = _notes(args, result, reading)
    costs_text = costs_yaml(result.costs) if args.save_costs else ""
    page_text = None
    if args.report:
        from .tuning.page import page

        page_text = page(result, coverage, powers, tables, notes, target.name)
    for table in tables if args.explain or not args.report else tables[:-1]:
        console.print(table)
    for note in notes:
        _print_line(console, note)
    write_atomically(args.out, buckets_yaml(result, notes).encode())
    if args.save_costs:
        write_atomically(args.save_costs, costs_text.encode())
    if page_text is not None:
        write_atomically(args.report, page_text.encode())
    _print_line(console, f"wrote {args.out}" + (f" and {args.report}" if args.report else ""))
    _print_line(console, f"next: staticvl compile CHECKPOINT --out ARTIFACT --buckets {args.out} --plan-only")
    return 0


def _print_line(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _check(args: argparse.Namespace) -> None:
    """Raise TraceError for a wrong command line, before anything slow."""
    if (args.trace is None) == (args.prompts is None):
        raise TraceError("give either a trace or --prompts, the lengths of prompts and their shares")
    if args.prompts is not None and (args.generated is None or args.rate is None):
        raise TraceError("--prompts needs --generated, the lengths of answers, and --rate, requests a second")
    if args.trace is not None and (args.generated is not None or args.images is not None):
        raise TraceError("--generated and --images describe requests without a trace; leave them out, the trace has them")
    for name in (
        "max_prefill_graphs",
        "max_decode_graphs",
        "max_vision_graphs",
        "granularity",
        "largest",
        "max_slots",
        "replay",
    ):
        if getattr(args, name) < 1:
            raise TraceError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    for name in ("max_graphs", "context", "slots", "rate", "max_compile_minutes", "max_memory_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise TraceError(f"--{name.replace('_', '-')} is {value}; expected a positive number")
    for path in filter(None, (args.out, args.report, args.save_costs)):
        if not path.parent.is_dir():
            raise TraceError(f"{shown(path.parent)} is not a folder; make it, or write {path.name} elsewhere")
        if path.is_dir():
            raise TraceError(f"{path} is a folder; expected the name of a file to write")
    if args.artifact and args.checkpoint:
        raise TraceError("give an artifact or a checkpoint, not both")
    if args.remeasure and (not args.artifact or args.card):
        raise TraceError("--remeasure runs the graphs of an artifact on this machine; give --artifact, and no --card")


def _target(args: argparse.Namespace) -> Target:
    if args.artifact:
        target = from_artifact(args.artifact, args.card, args.overhead_ms, args.remeasure, args.threads)
    elif args.costs and not args.checkpoint:
        target = Target(name=args.costs.name, costs=lambda context, slots: table)
    else:
        checkpoint, card = args.checkpoint or DEFAULT_MODEL, args.card or DEFAULT_CARD
        target = from_checkpoint(
            checkpoint,
            card,
            args.overhead_ms,
            quant=args.quant,
            dtype=args.dtype,
            vision_tower=args.vision_tower,
            kv_cache=args.kv_cache,
        )
    if args.costs:
        table = parse_costs(read_yaml(args.costs, CostError, "a YAML file with costs"), str(args.costs))
        target = dataclasses.replace(target, costs=lambda context, slots: table)
    return target


def _workload(args: argparse.Namespace, target: Target, reading: Reading) -> Workload:
    usual = _size(args.image_size)
    counter = ImageCounter(target.info, usual) if target.info else None
    context = args.context or target.max_positions
    workload = gather(_requests(args, reading), counter, crossed=target.crossed, context=context, block=args.replay)
    if workload.block:
        workload.block = with_times(workload.block, args.rate)
    return workload


def _requests(args: argparse.Namespace, reading: Reading) -> Iterator[Request]:
    if args.trace is not None:
        return read_trace(args.trace, reading)
    images = parse_distribution(args.images, "--images") if args.images else None
    prompts, generated = parse_distribution(args.prompts, "--prompts"), parse_distribution(args.generated, "--generated")
    return random_requests(prompts, generated, images, args.rate, RANDOM_REQUESTS)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and 0 < int(width) <= 1 << 16 and 0 < int(height) <= 1 << 16):
        raise TraceError(f"--image-size is {quoted(text)}; expected width and height in pixels, e.g. 1024x768")
    return int(width), int(height)


def _limits(args: argparse.Namespace) -> Limits:
    memory = args.max_memory_gb * 1e9 if args.max_memory_gb else None
    if (
        memory is None
        and not args.costs
        and (card := args.card or (None if args.artifact else DEFAULT_CARD)) not in (None, CPU)
    ):
        memory = CARDS[card].memory
    return Limits(
        prefill=args.max_prefill_graphs,
        decode=args.max_decode_graphs,
        vision=args.max_vision_graphs,
        graphs=args.max_graphs,
        compile_s=args.max_compile_minutes and 60 * args.max_compile_minutes,
        memory=memory,
        context=args.context,
        slots=args.slots,
        most_slots=args.max_slots,
        granularity=args.granularity,
        largest=args.largest,
        prefill_sizes=_prefill_sizes(args),
        least_saving=args.least_saving / 100,
    )


def _prefill_sizes(args: argparse.Namespace) -> tuple[int, ...]:
    name, text = "--prefill-sizes", args.prefill_sizes
    if args.candidates is not None:
        if text is not None:
            raise TraceError("--candidates is the old name of --prefill-sizes; leave it out")
        name, text = "--candidates", args.candidates
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise TraceError(f"{name} is {quoted(text)}; expected sizes separated by commas, e.g. 32,64,128,256")
    if args.candidates is not None:
        print("note: --candidates is now called --prefill-sizes; the old name will go", file=sys.stderr)
    return tuple(sorted({int(part) for part in parts}))


def _notes(args: argparse.Namespace, result: TuningResult, reading: Reading) -> list[str]:
    """Notes on the origin of the figures."""
    workload, block = result.workload, result.workload.block
    origin = args.trace.name if args.trace else "a distribution of the command line"
    notes = [
        f"made by staticvl tune-buckets from {origin}: {workload.requests} requests",
        f"costs: {result.costs.source}",
        f"replayed: {len(block)} requests that followed one another, {rate_of(block):.4g} a second",
    ]
    notes += reading.notes()
    if "bound" not in result.costs.source:
        notes.append(f"compiling these graphs where runs cost as much takes about {result.compile_s() / 60:.1f} minutes")
    if result.replayed.load > _BUSY:
        rate = len(block) / result.replayed.span_s
        notes.append(
            f"more requests arrive than can be served, which are about {rate:.3g} a second: times grow with the length of the "
            f"replay, and decode batches are as full as they can be; --rate {0.7 * rate:.2g} replays what this machine can take"
        )
    if args.rate is None and (note := load_note(offered_load(block, result.replayed), reading.times.taken)):
        notes.insert(0, note)
    return notes
