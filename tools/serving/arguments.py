"""The command line of `staticvl serve`; light, so that help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..run_options import add_cache_option
from ..verify_options import add_verify_options
from .settings import MIB, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="folder that staticvl compile wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port; default: 8000")
    parser.add_argument("--model-name", metavar="NAME", help="name of the model for clients; default: the artifact's folder")
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="repeat for several; others see it in the process list"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with one key a line; or STATICVL_API_KEYS, separated by commas",
    )
    group.add_argument("--allow-private-urls", action="store_true", help="fetch images from private addresses too")
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim; default: cpu")
    group.add_argument("--tp", type=int, metavar="N", help="ranks of each layer; default: as compiled")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: every core")
    group.add_argument("--prefill-budget", type=int, metavar="N", help="tokens of the largest chunk beside running answers")
    group.add_argument(
        "--system-in-user",
        action="store_true",
        help="put a system message that the checkpoint's template refuses, as Llama-3.2-Vision's does beside images, into the "
        "first user turn; default: an error",
    )
    group.add_argument("--no-reuse", action="store_true", help="no prefix cache and no encoder cache")
    group.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="K",
        help="draft up to K tokens of every answer; the artifact needs such graphs",
    )
    add_verify_options(group)
    add_cache_option(group)
    group.add_argument("--image-cache-mb", type=int, default=256, metavar="MB", help="size of the encoder cache; default: 256")
    group.add_argument("--request-log", type=Path, metavar="FILE", help="append sizes and times of every request")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-waiting", type=int, default=64, metavar="N", help="answers that may wait for a slot; default: 64")
    group.add_argument("--max-body-mb", type=float, default=32, metavar="MB", help="largest body of a request; default: 32")
    group.add_argument("--max-images", type=int, default=8, metavar="N", help="most images of a request; default: 8")
    group.add_argument("--max-image-mb", type=float, default=16, metavar="MB", help="largest file of an image; default: 16")
    group.add_argument(
        "--max-image-pixels", type=int, default=40_000_000, metavar="N", help="most pixels of an image; default: 40000000"
    )
    group.add_argument("--request-s", type=float, default=600, metavar="S", help="time limit of a request; default: 600")
    group.add_argument("--fetch-s", type=float, default=20, metavar="S", help="time limit of an image's download; default: 20")
    group.add_argument("--send-s", type=float, default=60, metavar="S", help="time that an answer may stay unread; default: 60")
    group.add_argument(
        "--stall-s", type=float, default=60, metavar="S", help="time of one step after which /health is 503; default: 60"
    )
    group.add_argument(
        "--drain-s",
        type=float,
        default=30,
        metavar="S",
        help="time for running requests when the server ends; default: 30",
    )


def settings_of(args: argparse.Namespace, keys: tuple[str, ...]) -> Settings:
    """The settings of a command line; raises ValueError for a limit under which no request could be served."""
    for name in ("max_body_mb", "max_image_mb", "max_image_pixels", "request_s", "fetch_s", "send_s", "stall_s"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; expected more than 0")
    for name in ("max_waiting", "max_images", "drain_s"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name):g}; expected 0 or more")
    return Settings(
        model_name=args.model_name or args.artifact.resolve().name,
        keys=keys,
        allow_private_urls=args.allow_private_urls,
        max_waiting=args.max_waiting,
        max_body_bytes=int(args.max_body_mb * MIB),
        max_images=args.max_images,
        max_image_bytes=int(args.max_image_mb * MIB),
        max_image_pixels=args.max_image_pixels,
        request_s=args.request_s,
        fetch_s=args.fetch_s,
        send_s=args.send_s,
        stall_s=args.stall_s,
        drain_s=args.drain_s,
    )
