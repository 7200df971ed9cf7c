"""The command line of `staticvl tune-buckets`; light, so that help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...model_defs.config import KV_CACHES, QUANTS
from ..cards import CARDS

EXAMPLES = (
    "staticvl tune-buckets trace.csv --artifact llava-7b --out buckets.yaml --report report.html\n"
    "staticvl tune-buckets trace.csv --checkpoint llava-1.5-7b-hf --card 910B --max-graphs 14 --out b.yaml --explain\n"
    "staticvl tune-buckets requests.jsonl --artifact llava-7b --remeasure 5 --rate 0.5 --out buckets.yaml\n"
    "staticvl tune-buckets --prompts 20-400:3,1000-2000 --images 0:1,1:3 --generated 20-300 --rate 2 --out buckets.yaml"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="?",
        type=Path,
        help="CSV or JSON, perhaps gzip: tokens of prompts and of answers, times, images or their sizes",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="YAML to write, for staticvl compile --buckets")
    parser.add_argument("--report", type=Path, metavar="FILE", help="one HTML file with the figures and plots")
    parser.add_argument("--explain", action="store_true", help="print the saving of each bucket")
    _add_costs(parser.add_argument_group("model and costs"))
    _add_requests(parser.add_argument_group("requests"))
    _add_limits(parser.add_argument_group("limits"))


def _add_costs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--artifact", type=Path, metavar="DIR", help="take the costs measured when it was compiled")
    group.add_argument(
        "--remeasure", type=int, default=0, metavar="N", help="measure its graphs again, the best of N runs each; 0: do not"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of --remeasure; default: every core")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="folder or known name: count the operations of its graphs instead; default: llava-1.5-7b-hf",
    )
    group.add_argument("--vision-tower", type=Path, metavar="DIR", help="the CLIP folder, for checkpoints that store it apart")
    group.add_argument(
        "--card",
        choices=[*sorted(CARDS), "cpu"],
        help="take lower bounds on this device as costs; default: 910B, with an artifact none",
    )
    group.add_argument("--overhead-ms", type=float, default=0.0, metavar="MS", help="milliseconds added to every run on a card")
    group.add_argument("--quant", choices=QUANTS, default="none", help="quantisation of --checkpoint")
    group.add_argument("--kv-cache", choices=KV_CACHES, default="float", help="cache of --checkpoint")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="",
        help="dtype of --checkpoint; default: float16, on cpu float32",
    )
    group.add_argument("--costs", type=Path, metavar="FILE", help="YAML with milliseconds: {prefill: {16: 4.1, 64: 9.5}, ...}")
    group.add_argument("--save-costs", type=Path, metavar="FILE", help="write the measured costs as such a table")


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--prompts", metavar="DIST", help="instead of a trace, lengths and shares: 100-500:3,1020:1")
    group.add_argument("--generated", metavar="DIST", help="with --prompts: tokens of the answers")
    group.add_argument("--images", metavar="DIST", help="with --prompts: number of images of a request")
    group.add_argument("--image-size", default="1024x768", metavar="WxH", help="size of images, where the trace has none")
    group.add_argument(
        "--time-unit",
        choices=("s", "ms", "us", "ns"),
        help="unit of times; default: by the column's name and their size, else s",
    )
    group.add_argument(
        "--columns", metavar="M=NAME,...", help="names of columns where they are not known: prompt=A,output=B,time=C"
    )
    group.add_argument("--skip-bad-rows", action="store_true", help="leave out and count rows that cannot be read")
    group.add_argument("--rate", type=float, metavar="R", help="requests a second in the replay; default: as in the trace")
    group.add_argument("--replay", type=int, default=4000, metavar="N", help="number of requests to replay")


def _add_limits(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-graphs", type=int, metavar="N", help="most graphs of all kinds together")
    for kind, default in (("prefill", 6), ("decode", 6), ("vision", 4)):
        group.add_argument(f"--max-{kind}-graphs", type=int, default=default, metavar="N", help=f"most graphs of {kind}")
    group.add_argument(
        "--max-compile-minutes", type=float, metavar="M", help="longest compile time, estimated from measured costs"
    )
    group.add_argument(
        "--max-memory-gb", type=float, metavar="GB", help="most memory for weights and cache; default: that of the card"
    )
    group.add_argument("--context", type=int, metavar="N", help="tokens of a slot; default: those of the longest request")
    group.add_argument("--slots", type=int, metavar="N", help="exact number of slots; default: chosen in the replay")
    group.add_argument("--max-slots", type=int, default=32, metavar="N", help="most slots, where the replay chooses")
    group.add_argument("--granularity", type=int, default=16, metavar="N", help="step between sizes of prefill buckets")
    group.add_argument("--largest", type=int, default=2048, metavar="N", help="largest prefill bucket")
    group.add_argument(
        "--least-saving",
        type=float,
        default=0.1,
        metavar="PERCENT",
        help="least share of the time of its kind that one more graph must save",
    )
    group.add_argument(
        "--prefill-sizes",
        metavar="A,B",
        help="the sizes to choose prefill buckets from; default: multiples of --granularity up to --largest",
    )
    group.add_argument("--candidates", metavar="A,B", help=argparse.SUPPRESS)  # the old name of --prefill-sizes
