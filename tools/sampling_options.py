"""How tokens are chosen, on the command line: an option for every field of SamplingParams.

A setting that is not given stays what SamplingParams makes of it, so that defaults are said in one place.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.engine.request import SamplingParams

EXAMPLES = (
    "staticvl generate llava-7b --prompt 'Write a haiku.' --temperature 0.7 --n 3 --seed 1 --json\n"
    "staticvl generate llava-7b --image cat.jpg --prompt 'Which animal?' --choice cat --choice dog --logprobs 3\n"
    "staticvl generate llava-7b --prompt 'A cat as JSON' --json-schema '{\"type\": \"object\"}' --deadline 30\n"
    "staticvl generate llava-7b --prompt 'Hello' --bad-word sorry --logit-bias 1234=-5 --stop-token-ids 13 2"
)


def add_sampling_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """`several`: whether there may be more than one answer to a prompt."""
    group = parser.add_argument_group("how tokens are chosen")
    add = _adder(group)
    add("--temperature", type=float, metavar="T", help="0: greedy; default: the checkpoint's")
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens; 0: no limit; default: the checkpoint's")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="only the likeliest tokens that have this share of the probability; default: the checkpoint's",
    )
    add("--min-p", type=float, metavar="P", help="least share of the likeliest token's probability; default: the checkpoint's")
    add("--seed", type=int, metavar="N", help="the same draws in every run; default: others in each")
    if several:
        add("--n", type=int, metavar="N", help="answers to the prompt, drawn one by one; default: 1")
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="for tokens of the prompt or the answer; 1: none; default: the checkpoint's",
    )
    add("--presence-penalty", type=float, metavar="X", help="for tokens that are in the answer")
    add("--frequency-penalty", type=float, metavar="X", help="for tokens, as often as they are in the answer")
    add("--logit-bias", type=_bias, action="append", metavar="ID=X", help="add X to the logit of a token; may be repeated")
    add("--logprobs", type=int, metavar="K", help="the logarithm of every token's probability, and the K likeliest tokens")
    group = parser.add_argument_group("when the answer ends, and what it may be")
    add = _adder(group)
    add("--max-new-tokens", "--max-tokens", type=int, metavar="N", help="default: 128")
    add("--min-new-tokens", "--min-tokens", type=int, metavar="N", help="no end before so many; default: 0")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--stop-token-ids", type=int, nargs="+", action="extend", metavar="ID", help="end the answer with one of these tokens")
    add("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add("--deadline", dest="deadline_s", type=float, metavar="S", help="end the answer, whatever it is, after S seconds")
    add(
        "--bad-word",
        "--bad-words",
        dest="bad_words",
        action="append",
        metavar="TEXT",
        help="must not be in the answer; may be repeated",
    )
    add("--json-schema", metavar="JSON", help="what the answer must be, as a JSON schema")
    add("--regex", metavar="RE", help="what the answer must be, as a regular expression")
    add("--choice", action="append", metavar="TEXT", help="one of the texts that the answer may be; to be repeated")
    add("--speculate", type=int, metavar="K", help="draft up to K tokens from what was said before; the answer is the same")
    add("--priority", type=int, metavar="P", help="requests of a higher one are admitted earlier; default: 0")


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """The settings that were given; raises ValueError for values that cannot be used."""
    from ..runtime.sampling.params import SETTINGS, SamplingParams

    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return SamplingParams(**given)


def _adder(group: Any):
    """What is not given is not set at all."""
    return lambda *names, **how: group.add_argument(*names, default=argparse.SUPPRESS, **how)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a token id and a number, such as 1234=-5") from None
