"""Sampling settings on the command line: an option for every field of SamplingParams.

Settings that are not given have the defaults of SamplingParams.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.engine.request import SamplingParams

Adder = Callable[..., argparse.Action]  # add_argument of a group

EXAMPLES = (
    "staticvl generate llava-7b --prompt 'Write a haiku.' --temperature 0.7 --n 3 --seed 1 --json\n"
    "staticvl generate llava-7b --image cat.jpg --prompt 'Which animal?' --choice cat --choice dog --logprobs 3\n"
    "staticvl generate llava-7b --prompt 'A cat as JSON' --json-schema '{\"type\": \"object\"}' --deadline 30\n"
    "staticvl generate llava-7b --prompt 'Hello' --bad-word sorry --logit-bias 1234=-5 --stop-token-ids 13 2"
)


def add_sampling_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """`several`: whether there may be more than one answer to a prompt."""
    _add_choice(_adder(parser.add_argument_group("how tokens are chosen")), several=several)
    _add_penalties(_adder(parser.add_argument_group("penalties and biases")))
    _add_ends(_adder(parser.add_argument_group("when the answer ends")))
    _add_constraints(_adder(parser.add_argument_group("constraints of the answer")))
    _add_order(_adder(parser.add_argument_group("when and how it is computed")))


def _add_choice(add: Adder, *, several: bool) -> None:
    add("--temperature", type=float, metavar="T", help="0: greedy; default: the checkpoint's")
    add("--top-k", type=int, metavar="K", help="only the top K tokens; 0: no limit; default: the checkpoint's")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="only the top tokens that reach this share of the probability; default: the checkpoint's",
    )
    add("--min-p", type=float, metavar="P", help="least probability, relative to the top token's; default: the checkpoint's")
    add("--seed", type=int, metavar="N", help="seed of the draws; default: a new one in each run")
    if several:
        add("--n", type=int, metavar="N", help="answers to the prompt, drawn one by one; default: 1")
    add(
        "--logprobs",
        type=int,
        metavar="K",
        help="the logarithm of every token's probability, and the top K tokens; default: none",
    )


def _add_penalties(add: Adder) -> None:
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="for tokens of the prompt or the answer; 1: none; default: the checkpoint's",
    )
    add("--presence-penalty", type=float, metavar="X", help="for tokens that are in the answer; default: 0")
    add("--frequency-penalty", type=float, metavar="X", help="for tokens, as often as they are in the answer; default: 0")
    add(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=X",
        help="add X to the logit of a token; may be repeated; default: none",
    )


def _add_ends(add: Adder) -> None:
    add("--max-new-tokens", "--max-tokens", type=int, metavar="N", help="tokens of the answer at most; default: 128")
    add(
        "--min-new-tokens", "--min-tokens", type=int, metavar="N", help="tokens before which the answer may not end; default: 0"
    )
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated; default: none")
    add(
        "--stop-token-ids",
        type=int,
        nargs="+",
        action="extend",
        metavar="ID",
        help="end the answer with one of these tokens; default: none",
    )
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token; default: off")
    add(
        "--deadline",
        dest="deadline_s",
        type=float,
        metavar="S",
        help="end the answer, whatever it is, after S seconds; default: none",
    )


def _add_constraints(add: Adder) -> None:
    add(
        "--bad-word",
        "--bad-words",
        dest="bad_words",
        action="append",
        metavar="TEXT",
        help="must not be in the answer; may be repeated; default: none",
    )
    add("--json-schema", metavar="JSON", help="the answer is JSON of this schema; default: any text")
    add("--regex", metavar="RE", help="the answer matches this regular expression; default: any text")
    add(
        "--choice",
        action="append",
        metavar="TEXT",
        help="the answer is one of these texts; to be repeated; default: any text",
    )


def _add_order(add: Adder) -> None:
    add("--speculate", type=int, metavar="K", help="draft up to K tokens by prompt lookup; the answer is the same; default: 0")
    add("--priority", type=int, metavar="P", help="requests of a higher priority are admitted earlier; default: 0")


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """The settings of a command line; raises ValueError for values that cannot be used."""
    from ..runtime.sampling.params import SETTINGS, SamplingParams

    settings: dict[str, Any] = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if "logit_bias" in settings:
        settings["logit_bias"] = dict(settings["logit_bias"])
    return SamplingParams(**settings)


def _adder(group: argparse._ArgumentGroup) -> Adder:
    """`add_argument` of a group; an option that is not given is no attribute of the namespace."""
    return lambda *names, **how: group.add_argument(*names, default=argparse.SUPPRESS, **how)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a token id and a number, such as 1234=-5") from None
