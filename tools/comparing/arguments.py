"""The command line of `staticvl compare`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, help="checkpoint or artifact")
    parser.add_argument("candidate", type=Path, help="checkpoint or artifact")
    by = ("auto", "transformers", "eager")
    group = parser.add_argument_group("sides")
    group.add_argument(
        "--reference-by", choices=by, default="auto", help="what runs a checkpoint: transformers, or the definitions (eager)"
    )
    group.add_argument("--candidate-by", choices=by, default="auto", help="what runs it, where the candidate is a checkpoint")
    group.add_argument(
        "--reference-device", default="auto", metavar="DEVICE", help="device of a reference artifact: cpu, npu, npu:1 or sim"
    )
    group.add_argument(
        "--device", default="auto", metavar="DEVICE", help="device of a candidate artifact; default: cpu, for Ascend sim"
    )
    group.add_argument("--vision-tower", type=Path, metavar="DIR", help="the CLIP folder, for checkpoints that store it apart")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: every core")
    group.add_argument("--work", type=Path, metavar="DIR", help="folder for converted weights of a checkpoint; default: /tmp")
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="questions in one of many formats, see docs/comparing.md",
    )
    group.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="folder of the images of --data; default: the folder of the file"
    )
    group.add_argument("--samples", type=int, metavar="N", help="only the first N samples of --data; default: all")
    group.add_argument("--new-tokens", type=int, default=16, metavar="N", help="tokens of missing answers; default: 16")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the built-in images and tokens; default: 0")
    group.add_argument("--no-edges", action="store_true", help="do not run every graph at the edges of its bucket")
    group = parser.add_argument_group("limits and results")
    group.add_argument("--thresholds", type=Path, metavar="FILE", help="YAML, e.g. w8a16: {kl: 0.05, agreement: 0.95}")
    group.add_argument(
        "--inspect",
        choices=("failed", "always", "never"),
        default="failed",
        help="compare every operator of graphs that broke a limit (the default), of all, or of none",
    )
    group.add_argument("--report", type=Path, metavar="FILE", help="one HTML file with plots")
    group.add_argument("--json", action="store_true", help="print one JSON object")
