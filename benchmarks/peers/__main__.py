"""staticvl against other libraries, on one model with random weights.

    make bench-peers                                           # the peers' environment, and everything
    python -m benchmarks.peers --out report.json [--only w8a16,llama.cpp] [--repeats 5] [--chart chart.svg]

Every contestant has its own process that works only in its turns, and the same number of threads. Figures are medians. Ratios
are taken between turns that follow each other, so other work on the machine affects them least. Checkpoints and the files that
the libraries make of them stay in --work for the next time: 35 to 45 GB if all take part.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import psutil
from rich.console import Console
from tqdm import tqdm

from benchmarks.bandwidth import read_gb_per_s
from staticvl.runtime.backends.cores import usable_cores
from staticvl.runtime.files import write_atomically
from staticvl.tools.development.random_checkpoint import write_checkpoint

from .chart import draw
from .contestants import CONTESTANTS, OURS, Contestant
from .match import Entry, Match, heats, prepare, write_reference
from .measures import measures, tokens
from .process import CHECKPOINT, Process
from .report import as_data, show
from .sizes import FULL, QUICK, Size

SEED = 99  # of the prompt after which answers are compared


def main() -> None:
    args = _parse()
    size = QUICK if args.quick else FULL
    contestants = [c for c in CONTESTANTS if not args.only or any(part in c.name for part in args.only.split(","))]
    if not contestants:
        raise SystemExit(f"--only {args.only} matches no contestant; available: {', '.join(c.name for c in CONTESTANTS)}")
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(size, args.work / CHECKPOINT)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    # The last ids stand for images and padding, and no text has them.
    vocab, side = min(config["text_config"]["vocab_size"], config["image_token_index"]), config["vision_config"]["image_size"]
    columns = measures(size, vocab, side)
    load = os.getloadavg()[0]
    start = partial(start_process, work=args.work, size=size, threads=args.threads, peers=args.peers_python)
    entries = [Entry(contestant) for contestant in contestants]
    with tqdm(disable=None, bar_format="{desc} [{elapsed}]") as bar:
        prepare(entries, start, bar.set_description)
        check = tokens(size.short, SEED, vocab), args.work / "reference.npy"
        write_reference(start, *check)
        bound = read_gb_per_s(args.threads, mebibytes=8 if args.quick else 512)
        machine = {"threads": args.threads, "read_gb_per_s": round(bound, 1), "load": load, "repeats": args.repeats}

        def save() -> None:
            write_atomically(args.out, json.dumps(as_data(entries, columns, machine), indent=1).encode())

        save()
        match = Match(columns, args.repeats, start, check, bar.set_description, save)
        play_all(match, [entry for entry in entries if entry.versions], args.memory)
    data = as_data(entries, columns, machine)
    if args.chart:
        draw(data).savefig(args.chart)
    show(Console(highlight=False, width=190), data)


def make_checkpoint(size: Size, folder: Path) -> Path:
    """The checkpoint of a size: one that is there, or random weights written into `folder` unless they are there."""
    if Path(size.source).is_dir():
        if not folder.exists():
            folder.symlink_to(size.source)
    elif not (folder / "config.json").is_file():
        write_checkpoint(Path(size.source), folder, dtype="bfloat16", overrides=size.overrides)
    return folder


def start_process(contestant: Contestant, *, work: Path, size: Size, threads: int, peers: Path) -> Process:
    python = Path(sys.executable) if contestant.venv == OURS else peers
    return Process(contestant, python, work, size, threads)


def play_all(match: Match, entries: list[Entry], gigabytes: float) -> None:
    """Run all heats. The anchor's own figures are those of the first heat."""
    by_name = {entry.contestant.name: entry for entry in entries}
    for number, heat in enumerate(heats([entry.contestant for entry in entries], gigabytes)):
        anchor = by_name[heat[0].name]
        match.play([anchor if number == 0 else Entry(anchor.contestant), *(by_name[c.name] for c in heat[1:])])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the report, JSON")
    parser.add_argument("--chart", type=Path, help="also draw the figures into this file")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/peers"),
        help="folder for checkpoints and the files made of them; default: build/peers",
    )
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=Path("build/peers-venv/bin/python"),
        help="Python of the environment with the peers; default: build/peers-venv/bin/python",
    )
    parser.add_argument("--only", default="", help="parts of contestants' names, separated by commas; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant in each measure; default: 5")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    available = psutil.virtual_memory().available / 1e9
    parser.add_argument(
        "--memory",
        type=float,
        default=0.7 * available,
        help="GB of memory for all contestants together; default: 0.7 of the free memory",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the benchmark itself")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats is {args.repeats}; expected at least 1")
    # Workers are started in the repository's root, wherever this was called.
    for name in ("work", "peers_python", "out"):
        setattr(args, name, Path(os.path.abspath(getattr(args, name))))  # noqa: PTH100  a venv's python is a link: not resolved
    return args


if __name__ == "__main__":
    main()
