"""`staticvl`: the command line. The module of a command is imported when it runs, so that light commands start at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import bench_arguments, compile_arguments, lint_arguments
from .card_options import add_card_options
from .command_errors import Parser, sentence_of
from .command_help import help_of
from .comparing.arguments import add_arguments as add_compare_arguments
from .root_options import add_root_options
from .run_options import add_artifact, add_cache_option, add_device_options
from .sampling_options import EXAMPLES as SAMPLING_EXAMPLES
from .sampling_options import add_sampling_options
from .serving.arguments import add_arguments as add_serve_arguments
from .tuning import arguments as tuning_arguments
from .verify_options import add_verify_options

EXTRAS = {
    "matplotlib": "tune",
    "llguidance": "constrain",
    "transformers": "test",
    "cryptography": "sign",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"), "serve"),
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its help, its arguments, and the module of tools/ whose `run` takes them and returns the exit status."""

    name: str
    help: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    module: str

    def run(self, args: argparse.Namespace) -> int:
        return importlib.import_module(f".{self.module}", __package__).run(args)


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn expected errors into one line on stderr and exit status 1 (2 for a wrong command line)."""
    args = build_parser().parse_args(argv)
    try:
        return args.handler(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ModuleNotFoundError, MemoryError, ValueError, RuntimeError, OSError) as error:
        if args.traceback:
            raise
        print(f"staticvl: {_message(error)}", file=sys.stderr)
        return 1


def _message(error: Exception) -> str:
    """One sentence about an expected error."""
    if isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get((error.name or "").split(".")[0], "compile")
        return f"this command needs the package {error.name}; pip install 'staticvl[{extra}]'"
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); free some, or use smaller sizes"
    return sentence_of(error)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="staticvl", description="Vision-language models compiled to graphs of fixed, bucketed shapes.")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_root_options(parser)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.name, **help_of(command.help, command.examples))
        command.add_arguments(own)
        own.set_defaults(handler=command.run)
    return parser


# ---- arguments of the commands that have few


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    _add_image(parser)
    parser.add_argument("--raw", action="store_true", help="pass the text as it is, without the chat template")
    parser.add_argument("--request-log", type=Path, metavar="FILE", help="append sizes and times of the request, a JSON line")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the images with the answer's boxes on them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device_options(parser)
    add_cache_option(parser)
    add_verify_options(parser)
    add_sampling_options(parser, several=True)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_artifact(parser)
    _add_image(parser)
    add_device_options(parser)
    add_cache_option(parser)
    add_verify_options(parser)
    add_sampling_options(parser, several=False)


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", action="append", default=[], metavar="PATH_OR_URL", help="repeat for several images")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", nargs="?", type=Path, help="folder that staticvl compile wrote; without it, this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON document, for bug reports")
    add_card_options(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add_artifact(parser)
    parser.add_argument("--key", type=Path, metavar="PUBLIC", help="also check that it was signed with the key of this file")


def _add_sign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", nargs="?", type=Path, help="folder that staticvl compile wrote")
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", type=Path, metavar="FILE", help="the private key to sign with")
    keys.add_argument("--new-key", type=Path, metavar="FILE", help="make a private key, and FILE.pub for those who verify")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("llava15", "llava16", "mllama"), default="llava15", help="which of the tiny models")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the artifact there; default: a temporary folder")
    parser.add_argument("--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim (Ascend's graphs, simulated)")


# ---- the commands

COMMANDS = (
    Command(
        "compile",
        "compile a checkpoint into an artifact",
        compile_arguments.EXAMPLES,
        compile_arguments.add_arguments,
        "compile",
    ),
    Command(
        "generate",
        "answer one prompt",
        "staticvl generate llava-7b --image cat.jpg --prompt 'What is in the picture?'\n" + SAMPLING_EXAMPLES,
        _add_generate,
        "generate",
    ),
    Command(
        "chat",
        "chat with a model about images",
        "staticvl chat llava-7b --image cat.jpg\n"
        "staticvl chat llava-7b --temperature 0.7 --frequency-penalty 0.2 --stop USER: --deadline 60",
        _add_chat,
        "chat",
    ),
    Command(
        "serve",
        "answer requests over HTTP, in the form of OpenAI's API, with a page to try the model",
        "staticvl serve llava-7b                                   # then open http://127.0.0.1:8000\n"
        "staticvl serve llava-7b --host 0.0.0.0 --api-key-file keys.txt --model-name llava\n"
        "STATICVL_API_KEYS=abc,def staticvl serve llava-7b-tp2 --max-waiting 200 --drain-s 120 --request-log served.jsonl",
        add_serve_arguments,
        "serving.main",
    ),
    Command(
        "show",
        "print the contents of an artifact, a forecast of its cost on a card, and this machine",
        "staticvl show llava-7b\nstaticvl show llava-7b --card 310P\nstaticvl show llava-7b --json > report.json",
        _add_show,
        "show",
    ),
    Command(
        "verify",
        "check every file of an artifact against its digest, and remove files of a replaced one",
        "staticvl verify llava-7b\nstaticvl verify llava-7b --key release.key.pub",
        _add_verify,
        "verify",
    ),
    Command(
        "lint",
        "check the graphs of an Ascend artifact by rules of a card; exit status 1 on errors",
        lint_arguments.EXAMPLES,
        lint_arguments.add_arguments,
        "lint",
    ),
    Command(
        "sign",
        "sign an artifact, so that others can check who made it",
        "staticvl sign --new-key release.key\nstaticvl sign llava-7b --key release.key",
        _add_sign,
        "sign",
    ),
    Command(
        "bench",
        "measure an artifact on this machine; the last line is one JSON object",
        bench_arguments.EXAMPLES,
        bench_arguments.add_arguments,
        "bench",
    ),
    Command(
        "tune-buckets",
        "choose bucket sizes for the traffic of a trace",
        tuning_arguments.EXAMPLES,
        tuning_arguments.add_arguments,
        "tune_buckets",
    ),
    Command(
        "compare",
        "compare two sides number by number, and locate faults; exit status 1 where a limit is broken",
        "staticvl compare llava-1.5-7b-hf llava-7b --report report.html\n"
        "staticvl compare llava-1.5-7b-hf llava-7b-w8a16 --thresholds limits.yaml --json\n"
        "staticvl compare llava-7b llava-7b-npu --device sim --data questions.jsonl\n"
        "staticvl compare Qwen-VL-Chat qwen-vl --reference-by eager --data train.json --image-folder images",
        add_compare_arguments,
        "compare",
    ),
    Command(
        "demo",
        "compile an embedded tiny model and answer a question about an image",
        "staticvl demo\nstaticvl demo --model mllama --out artifact",
        _add_demo,
        "demo",
    ),
)


if __name__ == "__main__":
    sys.exit(main())
