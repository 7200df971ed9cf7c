"""`staticvl demo`: compiles an embedded tiny model and asks it about an image file.

The model runs on the CPU by ONNX Runtime, on an Ascend card, or in the simulator that runs the card's own graphs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from .. import runtime
from ..compiler.buckets import Buckets
from ..compiler.build import Report, build
from ..compiler.options import Options
from ..runtime.artifact import MANIFEST, ArtifactError
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.ascend.readiness import check_ready
from ..runtime.backends.open import DEVICES
from ..runtime.shown import quoted
from .generate import answer_lines
from .progress import TerminalProgress

ASSETS = Path(__file__).parent / "assets"
MODELS = {"llava15": "LLaVA-1.5", "llava16": "LLaVA-1.6", "mllama": "Llama-3.2-Vision"}  # trained, in ASSETS / tiny_NAME
TARGETS = {"onnx": "ONNX Runtime", "ascend": "Ascend, by torchair"}
# Simulating is slow: fewer graphs to check, and all of them in use.
BUCKETS = {"onnx": Buckets(), "ascend": Buckets(prefill=(16, 64), decode=(1,), context=1024, slots=1)}
IMAGE = ASSETS / "shapes.png"
FOLDER = Path("demo-artifact")  # of the working directory
QUESTIONS = (
    "What is in the picture?",
    "Please provide the bounding box coordinate of the region this sentence describes: {thing}.",
)

OVERVIEW = """\
This demo compiles a model and runs it; nothing is downloaded.
  Model   {checkpoint}, a trained {model} of less than 2 million parameters.
          It knows drawings of coloured shapes, and nothing else.
  Image   {image}
  Part 1  compiles it to graphs of fixed shapes, one for each size of input, and checks each graph.
  Part 2  asks the compiled model what is in the image, and where.
"""
COMPILED = """\
   Shown: {graphs} graphs, each checked against its definition, after {seconds:.1f} s.
   `vision` reads an image, `prefill` a prompt; `decode` makes the next token of its answers.
   An error is relative to the largest value: 1e-06 is a millionth.
   Graphs, weights and a model card are in {out}{removed}
"""
ANSWERED = """\
   Shown: two answers, computed by these graphs alone, {runs_on}.
   The second is a box, in fractions of the image and in its pixels. In brackets: lengths and times.
"""
RUNS_ON = {
    "cpu": "by ONNX Runtime on this processor",
    "npu": "on the Ascend card",
    "sim": "in the simulator of an Ascend card",
}
NEXT = """\
   Next: `staticvl demo --out DIR` keeps the artifact; `staticvl compile --help` is for your own checkpoint.
   In Python:
   from staticvl import runtime; runtime.load("ARTIFACT").generate("What is in the picture?", images=["cat.jpg"])"""


def embedded_artifact(folder: Path = FOLDER) -> Path:
    """An artifact's folder, as it is; where it is missing, the embedded LLaVA-1.5 is compiled into it for the CPU.

    For examples and tests that need some artifact at once. Raises what a build raises, ArtifactError among it.
    """
    if not (folder / MANIFEST).is_file():
        compile_embedded(folder)
    return folder


def compile_embedded(out: Path, name: str = "llava15", backend: str = "onnx") -> Report:
    """Compile one of MODELS, with a bar for each stage and a line for each graph."""
    checkpoint = ASSETS / f"tiny_{name}"
    return build(Options(checkpoint=checkpoint, out=out, backend=backend, buckets=BUCKETS[backend]), TerminalProgress())


def run(args: argparse.Namespace) -> int:
    _check(args.device)
    print(OVERVIEW.format(checkpoint=f"tiny_{args.model}", model=MODELS[args.model], image=IMAGE))
    if args.out is not None:
        return _demo(args, args.out, "")
    with tempfile.TemporaryDirectory(prefix="staticvl-demo-") as folder:
        return _demo(args, Path(folder) / "artifact", ",\n   which is removed at the end")


def _check(device: str) -> None:
    """Raise ArtifactError unless the device is there, before anything is compiled for it."""
    if device.partition(":")[0] not in (usable := [each for devices in DEVICES.values() for each in devices]):
        raise ArtifactError(f"device {quoted(device)} is unknown; expected one of {', '.join(usable)}")
    if device != "cpu":
        check_ready(device)
        torchair_host.wheel_folder()  # compiles the graphs


def _demo(args: argparse.Namespace, out: Path, removed: str) -> int:
    started, device = time.perf_counter(), args.device
    backend = "onnx" if device == "cpu" else "ascend"
    print(f"1. Compiling for {TARGETS[backend]}: kind of graph and bucket, checks, worst error, time of a run")
    report = compile_embedded(out, args.model, backend)
    graphs = len(report.manifest.graphs)
    print(COMPILED.format(graphs=graphs, seconds=time.perf_counter() - started, out=out, removed=removed))
    model = runtime.load(out, device=device)
    print(f"2. Asking about {IMAGE.name}")
    answer = _ask(model, QUESTIONS[0])
    _ask(model, QUESTIONS[1].format(thing=_first_thing(answer)))
    print(ANSWERED.format(runs_on=RUNS_ON[device.partition(":")[0]]))
    print(f"3. Done after {time.perf_counter() - started:.1f} s.\n{NEXT}")
    return 0


def _ask(model: runtime.Model, question: str) -> str:
    out = model.generate(question, images=[IMAGE], max_new_tokens=96, temperature=0)
    print(f"   Q: {question}")
    for line in answer_lines(out, model.processor.tokenizer).splitlines():
        print(f"   A: {line}" if line == out.text else f"      {line}")
    print()
    return out.text


def _first_thing(answer: str) -> str:
    """The first thing that the answer names: "A red circle at the top ..." -> "the red circle"."""
    return "the " + " ".join(answer.split()[1:3])
