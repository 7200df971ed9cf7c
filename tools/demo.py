"""`staticvl demo`: the embedded tiny model, compiled in front of the user, then asked about a picture file."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from .. import runtime
from ..compiler.build import build
from ..compiler.plan import Options
from .generate import answer_lines
from .progress import TerminalProgress

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "tiny_llava15"
PICTURE = ASSETS / "shapes.png"
QUESTIONS = (
    "What is in the picture?",
    "Please provide the bounding box coordinate of the region this sentence describes: {thing}.",
)


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        return _demo(args.out, args.device)
    with tempfile.TemporaryDirectory(prefix="staticvl-demo-") as folder:
        return _demo(Path(folder) / "artifact", args.device)


def _demo(out: Path, device: str) -> int:
    started = time.perf_counter()
    print(f"1. compiling {CHECKPOINT.name}, a trained LLaVA-1.5 of 1.6 million parameters, for ONNX Runtime")
    report = build(Options(checkpoint=CHECKPOINT, out=out), TerminalProgress())
    print(
        f"   {len(report.manifest.graphs)} graphs, each checked against its definition, "
        f"after {time.perf_counter() - started:.1f} s\n"
    )
    model = runtime.load(out, device=device)
    print(f"2. asking about {PICTURE.name}")
    seen = _ask(model, QUESTIONS[0])
    _ask(model, QUESTIONS[1].format(thing=_first_thing(seen)))
    print(f"3. done after {time.perf_counter() - started:.1f} s. Next: `staticvl compile --help`, or in Python:")
    print('   from staticvl import runtime; runtime.load("ARTIFACT").generate("What is in the picture?", images=["cat.jpg"])')
    return 0


def _ask(model: runtime.Model, question: str) -> str:
    out = model.generate(question, images=[PICTURE], max_new_tokens=96)
    print(f"   Q: {question}")
    for line in answer_lines(out).splitlines():
        print(f"   A: {line}" if line == out.text else f"      {line}")
    print()
    return out.text


def _first_thing(answer: str) -> str:
    """The first thing that the answer names: "A red circle at the top ..." -> "the red circle"."""
    return "the " + " ".join(answer.split()[1:3])
