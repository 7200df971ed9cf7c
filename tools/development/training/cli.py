"""The command line of the training package."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...command_errors import Parser
from ...drawings import KINDS
from .evaluation import cases, evaluate, report
from .family import Family
from .family_llava15 import Llava15
from .family_llava16 import Llava16
from .family_mllama import Mllama
from .loop import train

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (Llava15, Llava16, Mllama)}


def family_of(folder: Path) -> type[Family]:
    """The family of a checkpoint folder, by its config.json."""
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    matches = [family for family in FAMILIES.values() if family.model_type == model_type]
    if not matches:
        names = ", ".join(family.model_type for family in FAMILIES.values())
        raise ValueError(f"{folder} holds a model of type {model_type}; only {names} can be measured")
    return matches[0]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python -m staticvl.tools.development.train_tiny",
        description="Train a miniature vision-language model on drawings of shapes, or measure one.",
        epilog="examples:\n"
        "  python -m staticvl.tools.development.train_tiny --out tiny_llava15\n"
        "  python -m staticvl.tools.development.train_tiny --family llava16 --start tiny_llava15 --out tiny_llava16\n"
        "  python -m staticvl.tools.development.train_tiny --out quick --vision-steps 200 --steps 50\n"
        "  python -m staticvl.tools.development.train_tiny --evaluate tiny_llava15 --drawings 600",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint folder DIR")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the checkpoint folder DIR")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava15", help="model family to train")
    parser.add_argument("--start", type=Path, metavar="DIR", help="begin from the weights of this checkpoint folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training drawings (default: 0)")
    parser.add_argument("--vision-steps", type=int, help="steps for the vision tower (default: by family)")
    parser.add_argument("--steps", type=int, help="steps for the whole model (default: by family)")
    parser.add_argument("--batch", type=int, help="rows of a step (default: by family)")
    parser.add_argument("--rate", type=float, help="highest learning rate (default: by family)")
    parser.add_argument("--drill", nargs="+", choices=KINDS, help="kinds of question to favour (default: describe)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--drawings", type=int, default=600, help="held-out drawings to measure on (default: 600)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or measure, as the command line says."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.evaluate:
        family = family_of(options.evaluate)
        held_out = cases(options.drawings, pairs=family.pairs, any_form=family.any_form)
        print(report(evaluate(options.evaluate, held_out)))
        return
    family = FAMILIES[options.family]()
    overrides = {name: getattr(options, name) for name in ("vision_steps", "steps", "batch", "rate")}
    schedule = replace(family.schedule, **{name: value for name, value in overrides.items() if value is not None})
    if options.drill:
        schedule = replace(schedule, drill=tuple(options.drill))
    train(family, options.out, options.seed, schedule, options.start)
