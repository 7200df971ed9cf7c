"""`staticvl compare`: whether two sides of one model agree, and if not, where the fault is."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
from collections.abc import Callable

from rich.console import Console
from tqdm import tqdm

from ..compiler.eager import computing_with
from ..runtime.files import write_atomically
from .command_errors import sentence_of
from .comparing.compare import Comparison
from .comparing.open_side import check_side, open_side
from .comparing.report import conclusion, tables
from .comparing.result import ComparisonResult
from .comparing.samples import Sample, built_in_samples
from .comparing.sides import SideError
from .comparing.thresholds import read_thresholds
from .questions.read import read_data
from .ready import require

WIDTH = 160  # of tables in a file
SMALL = 200_000_000  # bytes of weights below which one thread is faster than several


def run(args: argparse.Namespace) -> int:
    """The exit status: 0 where everything is within the limits, else 1. With --json, an error is a document too."""
    try:
        return _run(args)
    except Exception as error:
        if args.json:
            print(json.dumps({"passed": False, "error": sentence_of(error)}))
        raise


def _run(args: argparse.Namespace) -> int:
    samples, limits = _samples(args), read_thresholds(args.thresholds)
    _check(args)
    with contextlib.ExitStack() as stack:
        threads = args.threads or _threads(args)
        stack.enter_context(computing_with(threads))
        common = {"threads": threads, "vision_tower": args.vision_tower, "work": args.work}
        reference = open_side(args.reference, by=args.reference_by, device=args.reference_device, like=args.candidate, **common)
        stack.callback(reference.close)
        candidate = open_side(args.candidate, by=args.candidate_by, device=args.device, like=args.reference, **common)
        stack.callback(candidate.close)
        result = Comparison(
            reference=reference,
            candidate=candidate,
            samples=samples,
            limits=limits,
            new_tokens=args.new_tokens,
            with_edges=not args.no_edges,
            inspect=args.inspect,
            seed=args.seed,
            stage=_bars(stack, args.json),
        ).run()
    _report(args, result)
    return 0 if result.passed else 1


def _samples(args: argparse.Namespace) -> list[Sample]:
    if args.data is None:
        if args.image_folder is not None:
            raise SideError("--image-folder is for the images of --data; give --data too, or leave it out")
        return built_in_samples(args.seed)
    return read_data(args.data, args.image_folder)[: args.samples]


def _check(args: argparse.Namespace) -> None:
    """Raise SideError for a wrong command line, before anything slow."""
    for name in ("new_tokens", "samples", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise SideError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    for folder, by, device in (
        (args.reference, args.reference_by, args.reference_device),
        (args.candidate, args.candidate_by, args.device),
    ):
        check_side(folder, by=by, device=device)
    if args.report:
        require("matplotlib")
        if args.report.is_dir():
            raise SideError(f"--report {args.report} is a folder; expected a file to write")
        if not args.report.parent.is_dir():
            raise SideError(f"{args.report.parent} is not a folder; make it, or write {args.report.name} elsewhere")


def _threads(args: argparse.Namespace) -> int | None:
    """Default threads: one for small models, else None, for every core."""
    files = [path for folder in (args.reference, args.candidate) for path in folder.rglob("*")]
    sizes = [path.stat().st_size for path in files if path.suffix in (".safetensors", ".bin")]
    return 1 if sum(sizes) < SMALL else None


def _bars(stack: contextlib.ExitStack, quiet: bool) -> Callable[[str, int], Callable[[], object]]:
    """A progress bar for each stage on stderr, none where that is no terminal."""

    def stage(name: str, steps: int) -> Callable[[], object]:
        bar = stack.enter_context(tqdm(total=steps, desc=name, disable=True if quiet else None, leave=False))
        return bar.update

    return stage


def _report(args: argparse.Namespace, result: ComparisonResult) -> None:
    if args.report:
        from .comparing.page import made_here, page

        today = datetime.datetime.now(datetime.UTC).date()
        write_atomically(args.report, page(result, made_here(today)).encode())
    if args.json:
        print(json.dumps(result.plain()))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    for table in tables(result):
        console.print(table)
    for line in (*result.notes, *conclusion(result)):
        console.print(line, markup=False, soft_wrap=True)
    if args.report:
        console.print(f"wrote {args.report}", markup=False, soft_wrap=True)
