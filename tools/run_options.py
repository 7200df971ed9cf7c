"""Options of every command that runs an artifact: the artifact and the device."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_artifact(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("artifact", type=Path, help="folder that staticvl compile wrote")


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """`device` and `threads`, as runtime.load takes them."""
    parser.add_argument("--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: every core")


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """`cache_gb`, as runtime.load takes it."""
    parser.add_argument(
        "--cache-gb",
        type=float,
        metavar="G",
        help="gigabytes of keys and values that slots may hold at once, on a CPU; default: every slot may be full",
    )
