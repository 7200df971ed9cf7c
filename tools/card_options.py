"""The card of a forecast, and its memory."""

from __future__ import annotations

import argparse

from .cards import CARDS


def add_card_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--card", choices=sorted(CARDS), default="910B", help="the card of the forecast; default: 910B")
    text = "memory of the device whose requests at once are counted; default: that of the card, 64 of a 910B"
    parser.add_argument("--memory-gb", type=_gigabytes, metavar="GB", help=text)


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{value:g} gigabytes; expected a positive number")
    return value
