"""Is a card right, and how fast is it? One command for the owner of one.

    python -m staticvl.tools.ascend_acceptance ARTIFACT
    python -m staticvl.tools.ascend_acceptance ARTIFACT --device npu:1 --image photo.jpg --json
    python -m staticvl.tools.ascend_acceptance ARTIFACT --operators-only
    python -m staticvl.tools.ascend_acceptance ARTIFACT --device sim

First, tests of single operators: the calls that the artifact's graphs make, at their sizes, lowered as those graphs are, and
compared with plain formulas. They need no weights. Then every graph of the artifact runs on the card and on the simulator with
the same inputs, at the edges of its bucket; then both answer the same question about an image. Printed are the distance of each
operator and each graph, whether the answers agree, and the card's time to first token and per token. The exit status is 1 where
an operator test failed, or a graph is further away than --tolerance.

The card and the simulator cannot be used in one process, so each runs in one of its own. `--device sim` has the simulator in
place of the card, to see what the command does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..runtime.artifact import ArtifactError, GraphSpec, Manifest, open_artifact
from ..runtime.backends.ascend.readiness import check_ready
from .command_errors import Parser
from .operator_tests.outcome import failed
from .operator_tests.process import OperatorTestError, run_operator_tests
from .operator_tests.report import print_outcomes, rows
from .operator_tests.tolerances import GRAPH, in_words

IMAGE = Path(__file__).parent / "assets" / "shapes.png"
QUESTION = "What is in the picture?"
CASES = 3  # of each graph: the fullest, and the first ones
REFERENCE = "sim"


@dataclass(frozen=True, slots=True)
class Compared:
    """One graph on both devices: length of the difference over the reference's length, in the worst case."""

    graph: str
    cases: int
    distance: float
    same_choice: float  # share of rows whose largest logit is the same; 1 for vision graphs


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parse(arguments)
    try:
        return _child(args) if args.child else _accept(args)
    except (ArtifactError, OperatorTestError) as error:
        print(f"staticvl: {error}", file=sys.stderr)
        return 1


def _accept(args: argparse.Namespace) -> int:
    manifest = open_artifact(args.artifact).manifest  # a damaged one is an error before anything is started
    if manifest.ascend is None:
        raise ArtifactError(
            f"{args.artifact} was compiled for {manifest.backend}, and cards are Ascend's; compile it with --backend ascend"
        )
    _check_devices(args.device)
    if args.tolerance is None:
        args.tolerance = GRAPH[manifest.cache.dtype]
    console = Console(highlight=False, quiet=args.json)
    outcomes = run_operator_tests(args.artifact, args.device)
    print_outcomes(outcomes, args.device, console)
    report: dict[str, Any] = {"operators": rows(outcomes), "failed": [outcome.case.name for outcome in failed(outcomes)]}
    if not args.operators_only:
        graphs = _compare_graphs(args, console)
        report = {**report, **graphs, "failed": report["failed"] + graphs["failed"]}
    if args.json:
        print(json.dumps(report))
    return 1 if report["failed"] else 0


def _check_devices(device: str) -> None:
    """Raise ArtifactError unless the simulator and the device are there."""
    check_ready(REFERENCE)
    try:
        check_ready(device)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; without a card, --device sim runs the same tests on the simulator") from error


def _compare_graphs(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run every graph and the question on both devices; for JSON."""
    with tempfile.TemporaryDirectory(prefix="staticvl-") as folder:
        (reference, expected), (device, answered) = (
            _run(args, each, Path(folder) / f"{i}.npz") for i, each in enumerate((REFERENCE, args.device))
        )
        compared = list(_compare(np.load(reference), np.load(device)))
    _print(args, compared, expected, answered, console)
    graphs = [{"graph": c.graph, "distance": c.distance, "same_choice": c.same_choice} for c in compared]
    failed = [each.graph for each in compared if not each.distance <= args.tolerance]
    return {"graphs": graphs, "failed": failed, "tolerance": args.tolerance, "simulator": expected, "device": answered}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m staticvl.tools.ascend_acceptance",
        description=description,
        epilog="examples:\n" + examples.partition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", type=Path, help="compiled with --backend ascend")
    parser.add_argument("--device", default="npu:0", help="npu:0, npu:1, ..., or sim, without a card; default: npu:0")
    parser.add_argument("--operators-only", action="store_true", help="test single operators and nothing else")
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="IMAGE", help="default: a small drawing")
    text = f"largest distance of a graph; default, by the artifact's dtype: {in_words(GRAPH)}"
    parser.add_argument("--tolerance", type=float, metavar="X", help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run(args: argparse.Namespace, device: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """Every graph and the question on one device: where the outputs lie, and what was answered how fast."""
    # torch loads torch_npu by itself where it is installed, which the simulator must not meet.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-m", __spec__.name, str(args.artifact), "--device", device, "--image", str(args.image)]
    done = subprocess.run([*command, "--child", str(out)], stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"device {device} stopped with status {done.returncode}; see the lines above")
    return out, json.loads(done.stdout.splitlines()[-1])


def _child(args: argparse.Namespace) -> int:
    """Run every graph and the question on one device, and print the answer as JSON."""
    from .. import runtime

    model = runtime.load(args.artifact, device=args.device, reuse=False)  # what is timed is computed
    np.savez(args.child, **_outputs(model, args.device))  # pyright: ignore[reportArgumentType]
    out = model.generate(QUESTION, images=[args.image], max_new_tokens=32, temperature=0, ignore_eos=True)
    model.generate(QUESTION, images=[args.image], max_new_tokens=2, temperature=0, ignore_eos=True)  # compiled by now
    out_again = model.generate(QUESTION, images=[args.image], max_new_tokens=32, temperature=0, ignore_eos=True)
    figures = {"ttft_ms": 1e3 * out_again.timings.first_token_s, "tpot_ms": 1e3 * out_again.timings.per_token_s}
    print(json.dumps({"text": out.text, "token_ids": list(map(int, out.token_ids)), **figures}))
    return 0


def _outputs(model: Any, device: str) -> dict[str, np.ndarray]:
    """The first output of every graph in some of its cases."""
    from ..compiler.cases import CaseMaker, rows_of
    from ..compiler.check import candidates_error
    from ..runtime.sampling.candidates import DENOMINATOR_ERROR

    backend, manifest = model.engine.backend, model.engine.manifest
    maker = CaseMaker(manifest.model, manifest.weights["text.embed.weight"].shape[0])
    outputs = {}
    for graph in tqdm(manifest.graphs, desc=device, unit="graph", disable=None, file=sys.stderr):
        maker.restart()
        for i, case in enumerate(_cases(manifest, graph)):
            feed = maker.feed(graph, case)
            if graph.kind != "vision":
                maker.fill(graph, case, feed, [backend])
            pixels = graph.kind == "vision" and not manifest.cache.cross
            rows = np.arange(graph.bucket) < case.count[0] if pixels else rows_of(graph, case)
            result = backend.run(graph, feed)
            if candidates_error(result, feed, rows) > DENOMINATOR_ERROR:
                raise SystemExit(
                    f"staticvl: {graph.name} on {device} gives candidates that are not the largest of its own logits; "
                    "compile the artifact again with --candidates 0, and please report it"
                )
            outputs[f"{graph.name}/{i}"] = result.first[rows].copy()
    return outputs


def _cases(manifest: Manifest, graph: GraphSpec) -> list[Any]:
    from ..compiler.cases import find_cases

    previous = max((bucket for bucket in manifest.buckets(graph.kind) if bucket < graph.bucket), default=0)
    *others, fullest = find_cases(graph, previous)
    return [fullest, *others[: CASES - 1]]


def _compare(reference: Any, device: Any) -> Iterator[Compared]:
    names = dict.fromkeys(key.partition("/")[0] for key in reference.files)
    for name in names:
        pairs = [(reference[key], device[key]) for key in reference.files if key.partition("/")[0] == name]
        logits = not name.startswith("vision")
        yield Compared(
            graph=name,
            cases=len(pairs),
            distance=max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs),
            same_choice=float(np.mean([np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in pairs])) if logits else 1.0,
        )


def _print(
    args: argparse.Namespace, compared: list[Compared], expected: dict[str, Any], answered: dict[str, Any], console: Console
) -> None:
    table = Table(title=f"{args.device} against the simulator")
    for column in ("graph", "cases", "distance", "same token", ""):
        table.add_column(column, justify="left" if column in ("graph", "") else "right")
    for each in compared:
        state = "ok" if each.distance <= args.tolerance else f"more than {args.tolerance:g}"
        table.add_row(each.graph, str(each.cases), f"{each.distance:.1e}", f"{100 * each.same_choice:.0f} %", state)
    console.print(table)
    pairs = zip(expected["token_ids"], answered["token_ids"], strict=True)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected["token_ids"]))
    console.print(f"Q: {QUESTION}\nA: {answered['text']}")
    console.print(f"the first {alike} of {len(expected['token_ids'])} tokens are those of the simulator")
    console.print(f"time to first token {answered['ttft_ms']:.1f} ms, then {answered['tpot_ms']:.2f} ms a token")


if __name__ == "__main__":
    sys.exit(main())
