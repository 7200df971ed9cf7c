"""Options of `staticvl lint`."""

from __future__ import annotations

import argparse

from .cards import CARDS
from .run_options import add_artifact

EXAMPLES = (
    "staticvl lint llava-7b-npu\n"
    "staticvl lint llava-7b-npu --card 310P\n"
    "staticvl lint llava-7b-npu --json > findings.json         # every node, for programs"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument(
        "--card",
        choices=sorted(CARDS, reverse=True),
        help="card of the rules; default: the one that the artifact was compiled for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every node")
