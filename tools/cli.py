"""`staticvl`: the command line. Each command imports what it needs, so that the light ones start at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from ..model_defs.config import KV_CACHES, QUANTS
from .cards import CARDS
from .command_errors import Parser, sentence_of
from .comparing.arguments import add_arguments as add_compare_arguments
from .sampling_options import EXAMPLES, add_sampling_options
from .serving.arguments import add_arguments as add_serve_arguments
from .verify_options import add_verify_options

EXTRAS = {
    "matplotlib": "tune",
    "llguidance": "constrain",
    "transformers": "test",
    "cryptography": "sign",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"), "serve"),
}
Handler = Callable[[argparse.Namespace], int]


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
    except ModuleNotFoundError as error:
        if args.traceback:
            raise
        extra = EXTRAS.get((error.name or "").split(".")[0], "compile")
        print(f"staticvl: this command needs the package {error.name}; pip install 'staticvl[{extra}]'", file=sys.stderr)
        return 1
    except MemoryError as error:
        if args.traceback:
            raise
        print(f"staticvl: there is not enough memory ({error}); free some, or ask for less", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if args.traceback:
            raise
        print(f"staticvl: {sentence_of(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="staticvl", description="Vision-language models compiled to graphs of fixed, bucketed shapes.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_compile(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_show(commands)
    _add_verify(commands)
    _add_sign(commands)
    _add_bench(commands)
    _add_tune_buckets(commands)
    _add_compare(commands)
    _add_demo(commands)
    return parser


def _command(commands, name: str, help_text: str, example: str, handler: Handler) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


# ---- compile


def _add_compile(commands) -> None:
    example = (
        "staticvl compile llava-1.5-7b-hf --out llava-7b\n"
        "staticvl compile llava-v1.5-7b --vision-tower clip-vit-large-patch14-336 --out llava-7b --quant w8a16\n"
        "staticvl compile llava-v1.6-vicuna-7b-hf --out llava-next-7b --context 4096 --buckets buckets.yaml --plan-only\n"
        "staticvl compile Llama-3.2-11B-Vision-Instruct --out llama-vision --images 2 --quant w8a16\n"
        "staticvl compile Qwen-VL-Chat --out qwen-vl --context 8192 --lora my-adapter\n"
        "staticvl compile llava-1.5-7b-hf --out llava-7b --quant w8a8 --tune\n"
        "staticvl compile llava-1.5-7b-hf --out llava-7b-kv8 --kv-cache int8 --calibrate prompts.jsonl\n"
        "staticvl compile llava-1.5-7b-hf --out llava-7b-npu --backend ascend --dtype bfloat16"
    )
    parser = _command(commands, "compile", "compile a checkpoint into an artifact", example, _compile)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder with config.json, weights and tokenizer")
    parser.add_argument("--out", type=Path, metavar="ARTIFACT", help="folder to write; an earlier artifact there is updated")
    parser.add_argument("--backend", choices=("onnx", "ascend"), help="default: onnx")
    parser.add_argument("--quant", choices=QUANTS, help="default: what the checkpoint has")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16", "auto"),
        help="what floats are stored in. ascend: cache and arithmetic too, default float16. onnx: matrices alone, auto as the "
        "checkpoint has them; default float32, and beside quantised layers auto for the embedding table",
    )
    parser.add_argument("--eager", metavar="KINDS", help="ascend: graph kinds to run op by op, e.g. prefill or vision,prefill")
    parser.add_argument("--soc", choices=("Ascend910B", "Ascend310P"), help="ascend: family of chips; default: Ascend910B")
    parser.add_argument("--tp", type=int, metavar="N", help="ranks that every layer is cut among; default: 1")
    parser.add_argument(
        "--pp", type=int, metavar="M", help="pipeline stages that share the layers, of N ranks each; default: 1"
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens that a prompt and its answer may take together")
    parser.add_argument("--slots", type=int, metavar="N", help="sequences that the cache holds at once")
    parser.add_argument("--images", type=int, metavar="N", help="Llama-3.2-Vision: images that a sequence may hold; default: 4")
    parser.add_argument(
        "--speculate",
        type=int,
        metavar="K",
        help="also compile graphs that verify up to K drafted tokens at once, for --speculate of generate; default: none",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="likeliest tokens that text graphs find, so that logits need not be read whole; default: 64 for ascend, else 0",
    )
    parser.add_argument(
        "--text-before-image",
        choices=("transformers", "meta"),
        help="Llama-3.2-Vision: whether text before the first image sees all images, as in transformers (the default), or "
        "none, as in Meta's code",
    )
    parser.add_argument(
        "--buckets", type=Path, metavar="FILE", help="YAML with prefill, decode, vision, verify, images, context, slots"
    )
    parser.add_argument("--vision-tower", type=Path, metavar="DIR", help="the CLIP folder, for checkpoints that store it apart")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="LoRA adapter, as PEFT saves it, to merge into the weights")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="w4a16, w8a8, --kv-cache int8: quantise by what layers take and keep when these prompts with images are run, "
        "JSON lines as compare --data reads them",
    )
    parser.add_argument(
        "--kv-cache",
        choices=KV_CACHES,
        help="int8: keys and values in 8 bits, a quarter of the cache (ascend: half); needs --calibrate; default: float",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        default=None,
        help="onnx: lower each text graph as is fastest on this machine, by a measurement of some seconds a graph",
    )
    parser.add_argument("--ignore-config-keys", metavar="A,B", help="config.json keys known not to matter")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same options in YAML")
    parser.add_argument("--plan-only", action="store_true", help="print graphs and memory, compile nothing")


def _compile(args: argparse.Namespace) -> int:
    from .compile import run

    return run(args)


# ---- generate and chat


def _add_generate(commands) -> None:
    example = "staticvl generate llava-7b --image cat.jpg --prompt 'What is in the picture?'\n" + EXAMPLES
    parser = _command(commands, "generate", "answer one prompt", example, _generate)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--raw", action="store_true", help="pass the text as it is, without the chat template")
    parser.add_argument("--request-log", type=Path, metavar="FILE", help="append sizes and times of the request, a JSON line")
    parser.add_argument("--draw", type=Path, metavar="OUT.png", help="write the images with the answer's boxes on them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_run_options(parser)
    add_verify_options(parser)
    add_sampling_options(parser, several=True)


def _add_chat(commands) -> None:
    example = (
        "staticvl chat llava-7b --image cat.jpg\n"
        "staticvl chat llava-7b --temperature 0.7 --frequency-penalty 0.2 --stop USER: --deadline 60"
    )
    parser = _command(commands, "chat", "talk with a model about images", example, _chat)
    parser.add_argument("artifact", type=Path)
    _add_run_options(parser)
    add_verify_options(parser)
    add_sampling_options(parser, several=False)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", action="append", default=[], metavar="PATH_OR_URL", help="repeat for several images")
    parser.add_argument("--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim; default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")


def _generate(args: argparse.Namespace) -> int:
    from .generate import run

    return run(args)


def _chat(args: argparse.Namespace) -> int:
    from .chat import run

    return run(args)


def _add_serve(commands) -> None:
    example = (
        "staticvl serve llava-7b                                   # then open http://127.0.0.1:8000\n"
        "staticvl serve llava-7b --host 0.0.0.0 --api-key-file keys.txt --model-name llava\n"
        "STATICVL_API_KEYS=abc,def staticvl serve llava-7b-tp2 --max-waiting 200 --drain-s 120 --request-log served.jsonl"
    )
    help_text = "answer requests over HTTP as OpenAI's interface has them, and show a page to try the model on"
    add_serve_arguments(_command(commands, "serve", help_text, example, _serve))


def _serve(args: argparse.Namespace) -> int:
    from .serving.main import run

    return run(args)


# ---- the others


def _add_show(commands) -> None:
    example = "staticvl show llava-7b\nstaticvl show llava-7b --card 310P"
    parser = _command(commands, "show", "print what an artifact holds, and what it could cost on a card", example, _show)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--card", choices=sorted(CARDS), default="910B", help="default: 910B")


def _add_verify(commands) -> None:
    help_text = "check every file of an artifact against its digest, and remove what a replaced one has left"
    example = "staticvl verify llava-7b\nstaticvl verify llava-7b --key release.key.pub"
    parser = _command(commands, "verify", help_text, example, _verify)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--key", type=Path, metavar="PUBLIC", help="check too that it was signed with the key of this file")


def _add_sign(commands) -> None:
    help_text = "sign an artifact, so that others can check who made it"
    example = "staticvl sign --new-key release.key\nstaticvl sign llava-7b --key release.key"
    parser = _command(commands, "sign", help_text, example, _sign)
    parser.add_argument("artifact", nargs="?", type=Path)
    keys = parser.add_mutually_exclusive_group(required=True)
    keys.add_argument("--key", type=Path, metavar="FILE", help="the private key to sign with")
    keys.add_argument("--new-key", type=Path, metavar="FILE", help="make a private key, and FILE.pub for those who verify")


def _show(args: argparse.Namespace) -> int:
    from .show import run

    return run(args)


def _verify(args: argparse.Namespace) -> int:
    from .verify import run

    return run(args)


def _sign(args: argparse.Namespace) -> int:
    from .sign import run

    return run(args)


def _add_bench(commands) -> None:
    example = (
        "staticvl bench llava-7b\nstaticvl bench llava-7b --json | tail -1\n"
        "staticvl bench llava-7b --requests requests.jsonl --rate 2 --request-log served.jsonl"
    )
    parser = _command(
        commands, "bench", "measure an artifact on this machine; the last line is one JSON object", example, _bench
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="print only the JSON object")
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="tokens generated in each measurement; default: 32"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each point; default: 3")
    parser.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="replay these instead: JSON lines with prompt, and perhaps images, max_new_tokens, time",
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests a second, at random times; default: the times in the file"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random times; default: 0")
    parser.add_argument("--prefill-budget", type=int, metavar="N", help="tokens of the largest chunk beside running answers")
    parser.add_argument("--no-reuse", action="store_true", help="compute every request afresh")
    parser.add_argument(
        "--request-log", type=Path, metavar="FILE", help="append sizes and times of every request, a JSON line each"
    )
    parser.add_argument("--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim; default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="default: every core")


def _bench(args: argparse.Namespace) -> int:
    if args.requests is not None:
        from .bench_requests import run
    else:
        from .bench import run

    return run(args)


def _add_tune_buckets(commands) -> None:
    example = (
        "staticvl tune-buckets trace.csv --artifact llava-7b --out buckets.yaml --report report.html\n"
        "staticvl tune-buckets trace.csv --checkpoint llava-1.5-7b-hf --card 910B --max-graphs 14 --out b.yaml --explain\n"
        "staticvl tune-buckets requests.jsonl --artifact llava-7b --remeasure 5 --rate 0.5 --out buckets.yaml\n"
        "staticvl tune-buckets --prompts 20-400:3,1000-2000 --images 0:1,1:3 --generated 20-300 --rate 2 --out buckets.yaml"
    )
    parser = _command(commands, "tune-buckets", "choose bucket sizes for the traffic of a trace", example, _tune_buckets)
    parser.add_argument(
        "trace", nargs="?", type=Path, help="CSV or JSON lines: prompt tokens, generated tokens, times, images or their sizes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="YAML to write, for staticvl compile --buckets")
    parser.add_argument("--report", type=Path, metavar="FILE", help="one HTML file with the figures and plots")
    parser.add_argument("--explain", action="store_true", help="say of each bucket what it saves")
    group = parser.add_argument_group("model and costs")
    group.add_argument("--artifact", type=Path, metavar="DIR", help="take the costs measured when it was compiled")
    group.add_argument(
        "--remeasure", type=int, default=0, metavar="N", help="measure its graphs again, the best of N runs each"
    )
    group.add_argument("--threads", type=int, metavar="N", help="with --remeasure; default: every core")
    group.add_argument(
        "--checkpoint", metavar="DIR", help="count operations of its graphs instead; or a name; default: llava-1.5-7b-hf"
    )
    group.add_argument("--vision-tower", type=Path, metavar="DIR", help="the CLIP folder, for checkpoints that store it apart")
    group.add_argument(
        "--card", choices=[*sorted(CARDS), "cpu"], help="at best on this device; default without an artifact: 910B"
    )
    group.add_argument("--overhead-ms", type=float, default=0.0, metavar="MS", help="of every run on a card; default: 0")
    group.add_argument("--quant", choices=QUANTS, default="none", help="with --checkpoint; default: none")
    group.add_argument("--kv-cache", choices=KV_CACHES, default="float", help="with --checkpoint; default: float")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="", help="with --checkpoint")
    group.add_argument("--costs", type=Path, metavar="FILE", help="YAML with milliseconds: {prefill: {16: 4.1, 64: 9.5}, ...}")
    group.add_argument("--save-costs", type=Path, metavar="FILE", help="write the measured costs as such a table")
    group = parser.add_argument_group("requests")
    group.add_argument("--prompts", metavar="DIST", help="instead of a trace, lengths and shares: 100-500:3,1020:1")
    group.add_argument("--generated", metavar="DIST", help="with --prompts: tokens of answers")
    group.add_argument("--images", metavar="DIST", help="with --prompts: images of a request; default: none")
    group.add_argument("--image-size", default="1024x768", metavar="WxH", help="where no sizes are given; default: 1024x768")
    group.add_argument("--rate", type=float, metavar="R", help="requests a second in the replay; default: as in the trace")
    group.add_argument("--replay", type=int, default=4000, metavar="N", help="requests that are replayed; default: 4000")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-graphs", type=int, metavar="N", help="of all kinds together")
    for kind, default in (("prefill", 6), ("decode", 6), ("vision", 4)):
        group.add_argument(f"--max-{kind}-graphs", type=int, default=default, metavar="N", help=f"default: {default}")
    group.add_argument("--max-compile-minutes", type=float, metavar="M", help="estimated from measured costs")
    group.add_argument("--max-memory-gb", type=float, metavar="GB", help="weights and cache; default: the card's")
    group.add_argument("--context", type=int, metavar="N", help="default: what the longest request takes")
    group.add_argument("--slots", type=int, metavar="N", help="default: chosen in the replay")
    group.add_argument("--max-slots", type=int, default=32, metavar="N", help="default: 32")
    group.add_argument("--granularity", type=int, default=16, metavar="N", help="of prefill buckets; default: 16")
    group.add_argument("--largest", type=int, default=2048, metavar="N", help="prefill bucket; default: 2048")
    group.add_argument(
        "--least-saving", type=float, default=0.1, metavar="PERCENT", help="of its kind's time, by one more graph; default: 0.1"
    )
    group.add_argument("--candidates", metavar="A,B", help="the sizes to choose prefill buckets from")


def _tune_buckets(args: argparse.Namespace) -> int:
    from .tune_buckets import run

    return run(args)


def _add_compare(commands) -> None:
    example = (
        "staticvl compare llava-1.5-7b-hf llava-7b --report report.html\n"
        "staticvl compare llava-1.5-7b-hf llava-7b-w8a16 --thresholds limits.yaml --json\n"
        "staticvl compare llava-7b llava-7b-npu --device sim --data questions.jsonl\n"
        "staticvl compare Qwen-VL-Chat qwen-vl --reference-by eager --data train.json --image-folder images"
    )
    parser = _command(
        commands,
        "compare",
        "compare two sides number by number, and name what is wrong; exit status 1 where a limit is broken",
        example,
        _compare,
    )
    add_compare_arguments(parser)


def _compare(args: argparse.Namespace) -> int:
    from .compare import run

    return run(args)


def _add_demo(commands) -> None:
    example = "staticvl demo\nstaticvl demo --model mllama --out artifact"
    parser = _command(commands, "demo", "compile an embedded tiny model and ask it about an image", example, _demo)
    parser.add_argument("--model", choices=("llava15", "llava16", "mllama"), default="llava15", help="default: llava15")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the artifact there; default: a temporary folder")
    parser.add_argument(
        "--device", default="cpu", help="cpu, npu, npu:1 (the second card) or sim (Ascend's graphs, simulated); default: cpu"
    )


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
