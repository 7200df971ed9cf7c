"""Options of commands that check an artifact before they run it."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_verify_options(parser: argparse._ActionsContainer) -> None:
    """`verify` and `verify_key`, as runtime.load takes them."""
    parser.add_argument("--verify", action="store_true", help="read every file first and check its digest, weights too")
    parser.add_argument(
        "--verify-key", type=Path, metavar="PUBLIC", help="refuse an artifact not signed with the key of this file; reads all"
    )
