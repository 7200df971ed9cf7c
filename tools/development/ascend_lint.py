"""The card lint over graphs of full-size models, without weights.

    python -m staticvl.tools.development.ascend_lint CONFIG_FOLDER... --markdown lint.md

Widths are those of the model, so that every limit is met as it would be; of the layers there are two (of each kind), which is
all that differs from one to the next. By default each model is lowered in the VARIANTS below, which have every quantisation,
dtype, cache and number of ranks at least once. The exit status is 1 where a card refuses something.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from tqdm import tqdm

from ...compiler.buckets import Buckets
from ...compiler.choices import PlanError
from ...compiler.emit_ascend import emit
from ...compiler.graphs import GraphContext, GraphDef, define_graph
from ...compiler.options import Options
from ...compiler.plan import make_plan
from ...model_defs.config import ConfigError, ModelConfig
from ...model_defs.config.types import ClipConfig, TiledConfig
from ...runtime.artifact import ArtifactError
from ...runtime.backends.ascend import torchair_host
from ...runtime.backends.ge_simulator import card_rules, ge_graph
from ...weights.tensors import WeightsError
from ..command_errors import Parser
from .ascend_coverage import CONTEXT, MODELS, any_image, list_item, named_config

PREFILL, DECODE, VERIFY, IMAGES = (64,), (1, 4), (5,), (1, 4)
LAYERS = 2
VARIANTS = (
    "none:float16:float:1", "w8a16:bfloat16:int8:1", "w4a16:float16:float:2", "w8a8:bfloat16:float:4",
    "none:bfloat16:int8:8", "w8a16:float16:float:4", "w4a16:bfloat16:int8:1", "w8a8:float16:int8:2",
    "w8a8+vision:float16:float:1", "w4a16-g32:bfloat16:float:2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """What a model is compiled to."""

    quant: str
    dtype: str
    cache: str
    tp: int

    @classmethod
    def of(cls, text: str) -> Variant:
        """Raises ValueError for anything but QUANT:DTYPE:CACHE:TP."""
        quant, dtype, cache, tp = text.split(":")
        return cls(quant, dtype, cache, int(tp))

    def __str__(self) -> str:
        return f"{self.quant}:{self.dtype}:{self.cache}:{self.tp}"


@dataclass(frozen=True, slots=True)
class GraphFinding:
    """A finding, and where it was."""

    model: str
    variant: Variant
    graph: str
    finding: card_rules.Finding


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        torchair_host.load()
        variants = [Variant.of(text) for text in arguments.variants]
        models = {Path(name).name: shallow(named_config(name)) for name in arguments.configs}
        graphs = [
            (name, variant, graph)
            for name, config in models.items()
            for variant in variants
            for graph in definitions(config, variant)
            if not arguments.graphs or graph.name in arguments.graphs
        ]
    except (ArtifactError, ConfigError, PlanError, WeightsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    findings: list[GraphFinding] = []
    with tqdm(graphs, desc="compiling graphs", unit="graph", disable=None, file=sys.stderr) as bar:
        for name, variant, graph in bar:
            parsed = ge_graph.parse(emit(graph, variant.dtype).graph)
            findings += [GraphFinding(name, variant, graph.name, each) for each in card_rules.lint(parsed, arguments.card)]
    text = markdown(findings, len(graphs))
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    return int(any(each.finding.rule.severity == "error" for each in findings))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="staticvl.tools.development.ascend_lint", description="The card lint over graphs of full-size models.")
    parser.add_argument("configs", nargs="+", metavar="CONFIG_FOLDER", help=f"a folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--variants", nargs="+", metavar="QUANT:DTYPE:CACHE:TP", default=VARIANTS, help="default: ten")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="only these, e.g. decode-4 (default: all)")
    parser.add_argument("--card", choices=card_rules.CARDS, default=card_rules.CARDS[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the list here")
    return parser


def shallow(config: ModelConfig) -> ModelConfig:
    """The model with few layers, one of them attending to images where any does."""
    text = replace(config.text, layers=LAYERS, cross_layers=(1,) if config.text.cross_layers else ())
    if isinstance(config.vision, ClipConfig):
        vision = replace(config.vision, layers=LAYERS, used_layers=LAYERS)
    elif isinstance(config.vision, TiledConfig):
        vision = replace(config.vision, layers=LAYERS, global_layers=1, taps=(0,))
    else:
        vision = replace(config.vision, layers=LAYERS)
    return replace(config, text=text, vision=vision)


def definitions(config: ModelConfig, variant: Variant) -> Iterator[GraphDef]:
    """Every kind of graph of one rank. Raises PlanError, and WeightsError for a model that cannot be cut so."""
    buckets = Buckets(
        prefill=PREFILL,
        decode=DECODE,
        verify=VERIFY,
        images=IMAGES if config.text.cross_layers else None,
        context=min(CONTEXT, config.text.max_positions),
        slots=max(DECODE),
    )
    options = Options(
        checkpoint=Path(),
        out=Path(),
        backend="ascend",
        dtype=variant.dtype,
        quant=variant.quant,
        tp=variant.tp,
        buckets=buckets,
    )
    plan = make_plan(config, options)
    cache = plan.cache
    if variant.cache == "int8":  # whose scales a calibration makes, and no graph depends on them
        config = replace(config, text=replace(config.text, int8_cache=True))
        cache = msgspec.structs.replace(cache, text_dtype="int8")
    context = GraphContext(
        config=config,
        image=any_image(config),
        cache=cache,
        quant=variant.quant,
        ranks=variant.tp,
        candidates=plan.candidates,
    )
    for key in plan.graphs:
        yield define_graph(context, key)


def markdown(findings: Sequence[GraphFinding], graphs: int) -> str:
    """An item for each rule: how many nodes, in which models, and how it comes about."""
    errors = sum(each.finding.rule.severity == "error" for each in findings)
    head = f"{graphs} graphs, {errors} errors. Made with torch_npu {torchair_host.VERSION}.\n"
    groups: dict[str, list[GraphFinding]] = {}
    for each in findings:
        groups.setdefault(each.finding.rule.id, []).append(each)
    items = []
    for rule, group in sorted(groups.items()):
        places = {(each.model, each.variant, each.graph) for each in group}
        first = group[0]
        models = ", ".join(dict.fromkeys(each.model for each in group))
        example = f"{first.graph} ({first.variant}): {first.finding.observed}"
        items.append(list_item(f"`{rule}`: {len(group)} nodes in {len(places)} graphs of {models}. For example {example}"))
    return "\n".join([head, *items]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
