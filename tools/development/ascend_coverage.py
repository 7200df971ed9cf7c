"""Every graph of a model at full size through torchair.

    python -m staticvl.tools.development.ascend_coverage CONFIG_FOLDER...

Configs are enough: nothing of a graph depends on weights, and tensors without data take no memory. A folder may also be the
name of a known model. Prints the Ascend operators of each graph, and with --markdown writes them as a list. With --tp N
the graphs are those of one rank of N.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...compiler.buckets import Buckets
from ...compiler.choices import PlanError
from ...compiler.emit_ascend import DTYPES, emit
from ...compiler.graphs import GraphContext, GraphDef, define_graph
from ...compiler.options import Options
from ...compiler.plan import make_plan
from ...model_defs.config import ConfigError, ModelConfig, read_config
from ...runtime.artifact import ArtifactError, ImageProcessorConfig
from ...runtime.backends.ascend import torchair_host
from ...runtime.backends.ge_simulator import ge_graph
from ...weights.tensors import WeightsError
from ..command_errors import Parser
from ..known_models import MODELS, write_known_model

PREFILL, DECODE, IMAGES = (1, 64), (1, 4), (1, 4)
CONTEXT = 2048
# Inputs and constants are not counted as operators.
NO_OPERATORS = ("Data", "Const", "NetOutput")


@dataclass(frozen=True, slots=True)
class Covered:
    """One graph that passed."""

    model: str
    graph: str
    types: dict[str, int]  # operators, most frequent first
    seconds: float

    @property
    def nodes(self) -> int:
        return sum(self.types.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        torchair_host.load()
        models = {Path(name).name: named_config(name) for name in arguments.configs}
        graphs = [
            (name if arguments.tp == 1 else f"{name}, one of {arguments.tp}", graph)
            for name, config in models.items()
            for graph in definitions(config, arguments.dtype, arguments.tp)
            if not arguments.graphs or graph.name in arguments.graphs
        ]
    except (ArtifactError, ConfigError, PlanError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = []
    with tqdm(graphs, desc="compiling graphs", unit="graph", disable=None, file=sys.stderr) as bar:
        for name, graph in bar:
            rows.append(cover(name, graph, arguments.dtype))
            tqdm.write(_line(rows[-1]), file=sys.stdout)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.dtype), encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="staticvl.tools.development.ascend_coverage", description="Every graph of a model at full size through torchair."
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG_FOLDER", help=f"a folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="graphs of one rank of N (default: %(default)s)")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="only these, e.g. decode-4 (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the list here")
    return parser


def named_config(name: str) -> ModelConfig:
    """The config in a folder, or of a known model. Raises ConfigError."""
    if name not in MODELS or Path(name).exists():
        return read_config(Path(name))
    with tempfile.TemporaryDirectory() as folder:
        write_known_model(name, Path(folder))
        return read_config(Path(folder))


def definitions(config: ModelConfig, dtype: str, tp: int = 1) -> Iterator[GraphDef]:
    """Every kind of graph of one rank of a model, at buckets that show what differs: one token and several, one row and
    several. Raises PlanError, and WeightsError for a model that cannot be sharded so."""
    buckets = Buckets(
        prefill=PREFILL,
        decode=DECODE,
        images=IMAGES if config.text.cross_layers else None,
        context=min(CONTEXT, config.text.max_positions),
        slots=max(DECODE),
    )
    options = Options(checkpoint=Path(), out=Path(), backend="ascend", dtype=dtype, tp=tp, buckets=buckets)
    plan = make_plan(config, options)
    context = GraphContext(config=config, image=any_image(config), cache=plan.cache, ranks=tp, candidates=plan.candidates)
    for key in plan.graphs:
        yield define_graph(context, key)


def any_image(config: ModelConfig) -> ImageProcessorConfig:
    """Sizes of the model's images; other settings do not change a graph."""
    half = (0.5, 0.5, 0.5)
    return ImageProcessorConfig(
        mode="stretch", size=config.vision.image_size, rows=config.vision.rows_per_tile, mean=half, std=half
    )


def cover(model: str, graph: GraphDef, dtype: str) -> Covered:
    """Compile one graph; whatever torchair raises names the graph."""
    start = time.perf_counter()
    try:
        emitted = emit(graph, dtype)
    except Exception as error:
        error.add_note(f"while compiling {graph.name} of {model}")
        raise
    seconds = time.perf_counter() - start
    types = {name: count for name, count in ge_graph.parse(emitted.graph).types().items() if name not in NO_OPERATORS}
    return Covered(model, graph.name, types, seconds)


def _line(row: Covered) -> str:
    return f"{row.model:40} {row.graph:20} {row.nodes:6} nodes {row.seconds:6.1f} s  {_types(row)}"


def _types(row: Covered) -> str:
    return ", ".join(f"{name} {count}" for name, count in row.types.items())


def markdown(rows: Sequence[Covered], dtype: str) -> str:
    """A list of graphs, with the versions and sizes that it was made with."""
    head = (
        f"Made with torch_npu {torchair_host.VERSION}, {dtype}, context {CONTEXT} at most. Inputs and constants not counted.\n"
    )
    items = [list_item(f"{row.model}, {row.graph}: {row.nodes} nodes, {row.seconds:.1f} s. {_types(row)}") for row in rows]
    return "\n".join([head, *items]) + "\n"


def list_item(text: str) -> str:
    """An item of a list in Markdown, in lines of at most 100 columns."""
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
