"""`staticvl chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys

from .. import runtime
from .ready import require
from .sampling_options import read_sampling

HELP = "type a message; /image PATH_OR_URL adds an image to the next one, /quit or end of input leaves"


def run(args: argparse.Namespace) -> int:
    sampling = read_sampling(args)
    if sampling.constrained:
        require("llguidance")
    images = list(args.image)
    print(HELP)
    settings = {"device": args.device, "threads": args.threads, "cache_gb": args.cache_gb}
    checks = {"verify": args.verify, "verify_key": args.verify_key}
    with runtime.load(args.artifact, **settings, **checks) as model, model.chat() as chat:
        while (line := _read()) is not None:
            if line.startswith("/image "):
                images.append(line.removeprefix("/image ").strip())
            elif line:
                images = _turn(chat, line, images, sampling)
    return 0


def _turn(chat, text: str, images: list[str], sampling: runtime.SamplingParams) -> list[str]:
    """Send one message; returns the images that are still to be sent: none, unless the turn failed."""
    try:
        for piece in chat.stream(text, images, sampling=sampling):
            print(piece, end="", flush=True)
        print()
        return []
    except ValueError as error:
        print(f"staticvl: {error}", file=sys.stderr)
        return []


def _read() -> str | None:
    try:
        line = input("> ").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line
