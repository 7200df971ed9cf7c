"""Thousands of bad inputs against this project, each of which must end in an answer of a stated kind.

    python -m tests.attack [--only KIND ...] [--count N] [--seconds S] [--seed N]
    python -m tests.attack --case KIND/INDEX --seed N     # one of them again, as a failure's line says

All of it stays on this machine: processes that it starts, files in a temporary folder, and loopback. Failures go to a file of
JSON lines. Exit status 1: a case ended in something that its kind does not allow.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .case import Case
from .kinds import KINDS
from .runner import Tally, Watch, run, run_kind, table


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="staticvl-attack-") as folder:
        if args.case:
            return _again(args.case, args.seed, Path(folder))
        kinds = [KINDS[name] for name in args.only or KINDS]
        tallies = run(kinds, count=args.count, seconds=args.seconds, seed=args.seed, folder=Path(folder), watch=Watch(args.out))
    print(table(tallies))
    if any(tally.done < tally.planned for tally in tallies):
        print(f"ended by --seconds {args.seconds:g} before all inputs were tried")
    if failed := any(tally.failures for tally in tallies):
        print(f"failures are in {args.out}")
    return int(failed)


def _again(name: str, seed: int, folder: Path) -> int:
    kind, _, index = name.partition("/")
    tallies = run_kind(KINDS[kind], [Case(kind, int(index), seed)], folder, float("inf"), _show)
    return int(bool(tallies.failures))


def _show(_: Tally, outcome: object) -> None:
    print(json.dumps(outcome.as_data(), indent=2))  # type: ignore[attr-defined]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help=f"some of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, metavar="N", help="inputs in all; default: those of a full run")
    parser.add_argument("--seconds", type=float, default=1800, metavar="S", help="for all inputs; default: 1800")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--case", metavar="KIND/INDEX", help="run one case again, and show how it ends")
    parser.add_argument("--out", type=Path, default=Path("build/attack.jsonl"), metavar="FILE", help="where failures go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
