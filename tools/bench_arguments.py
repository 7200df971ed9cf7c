"""The command line of `staticvl bench`; light, so that help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from .run_options import add_artifact, add_cache_option, add_device_options

EXAMPLES = (
    "staticvl bench llava-7b\nstaticvl bench llava-7b --json | tail -1\n"
    "staticvl bench llava-7b --requests requests.jsonl --rate 2 --request-log served.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="tokens generated in each measurement")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each point")
    add_device_options(parser)
    add_cache_option(parser)
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="replay these instead: JSON lines with prompt, and perhaps images, max_new_tokens, time",
    )
    group.add_argument(
        "--rate", type=float, metavar="R", help="requests a second, at random times; default: the times in the file"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random times")
    group.add_argument(
        "--prefill-budget", type=int, metavar="N", help="tokens of the largest chunk beside running answers; default: any chunk"
    )
    group.add_argument("--no-reuse", action="store_true", help="no prefix cache and no encoder cache")
    group.add_argument(
        "--request-log", type=Path, metavar="FILE", help="append sizes and times of every request, a JSON line each"
    )
