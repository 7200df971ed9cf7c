"""Is a card right, and how fast is it? One command for the owner of one.

    python -m staticvl.tools.ascend_acceptance ARTIFACT
    python -m staticvl.tools.ascend_acceptance ARTIFACT --device npu:1 --image photo.jpg --json

Every graph of the artifact runs on the card and on the simulator with the same inputs, at the edges of its bucket; then both
answer the same question about an image. Printed are the distance between the two for each graph, whether the answers agree,
and the card's time to first token and per token. The exit status is 1 where a graph is further away than --tolerance.

The card and the simulator cannot be used in one process, so each runs in one of its own.
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

IMAGE = Path(__file__).parent / "assets" / "shapes.png"
QUESTION = "What is in the picture?"
# Two machines that round to 11 bits in other orders; a graph that is wrong is off by the order of 1.
TOLERANCE = 2e-2
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
    if args.child:
        _child(args)
        return 0
    open_artifact(args.artifact)  # a damaged one is an error before anything is started
    for device in (REFERENCE, args.device):
        check_ready(device)
    with tempfile.TemporaryDirectory(prefix="staticvl-") as folder:
        (reference, expected), (device, answered) = (
            _run(args, each, Path(folder) / f"{i}.npz") for i, each in enumerate((REFERENCE, args.device))
        )
        compared = list(_compare(np.load(reference), np.load(device)))
    failed = [each.graph for each in compared if not each.distance <= args.tolerance]
    if args.json:
        rows = [{"graph": c.graph, "distance": c.distance, "same_choice": c.same_choice} for c in compared]
        print(json.dumps({"graphs": rows, "failed": failed, "simulator": expected, "device": answered}))
    else:
        _print(args, compared, expected, answered)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m staticvl.tools.ascend_acceptance",
        description=description,
        epilog="examples:\n" + examples.partition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("artifact", type=Path, help="compiled with --backend ascend")
    parser.add_argument("--device", default="npu:0", help="npu:0, npu:1, ...; default: npu:0")
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="IMAGE", help="default: a small drawing")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"default: {TOLERANCE}")
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


def _child(args: argparse.Namespace) -> None:
    from .. import runtime

    try:
        model = runtime.load(args.artifact, device=args.device, reuse=False)  # what is timed is computed
    except ArtifactError as error:
        raise SystemExit(f"staticvl: {error}") from error
    np.savez(args.child, **_outputs(model, args.device))  # pyright: ignore[reportArgumentType]
    out = model.generate(QUESTION, images=[args.image], max_new_tokens=32, temperature=0, ignore_eos=True)
    model.generate(QUESTION, images=[args.image], max_new_tokens=2, temperature=0, ignore_eos=True)  # compiled by now
    out_again = model.generate(QUESTION, images=[args.image], max_new_tokens=32, temperature=0, ignore_eos=True)
    figures = {"ttft_ms": 1e3 * out_again.timings.first_token_s, "tpot_ms": 1e3 * out_again.timings.per_token_s}
    print(json.dumps({"text": out.text, "token_ids": list(map(int, out.token_ids)), **figures}))


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


def _print(args: argparse.Namespace, compared: list[Compared], expected: dict[str, Any], answered: dict[str, Any]) -> None:
    table = Table(title=f"{args.device} against the simulator")
    for column in ("graph", "cases", "distance", "same token", ""):
        table.add_column(column, justify="left" if column in ("graph", "") else "right")
    for each in compared:
        state = "ok" if each.distance <= args.tolerance else f"more than {args.tolerance:g}"
        table.add_row(each.graph, str(each.cases), f"{each.distance:.1e}", f"{100 * each.same_choice:.0f} %", state)
    console = Console(highlight=False)
    console.print(table)
    pairs = zip(expected["token_ids"], answered["token_ids"], strict=True)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected["token_ids"]))
    console.print(f"Q: {QUESTION}\nA: {answered['text']}")
    console.print(f"the first {alike} of {len(expected['token_ids'])} tokens are those of the simulator")
    console.print(f"time to first token {answered['ttft_ms']:.1f} ms, then {answered['tpot_ms']:.2f} ms a token")


if __name__ == "__main__":
    sys.exit(main())
