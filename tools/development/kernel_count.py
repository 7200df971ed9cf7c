"""Kernels of one layer of a model at full size, as torchair makes them.

    python -m staticvl.tools.development.kernel_count CONFIG_FOLDER...

A layer's kernels are the difference between graphs of two models, one of which has a layer more. Both are a few layers deep, so
that a count takes seconds, and neither needs weights. Operators that only see a tensor in another shape launch nothing on a
device and are left out; what CANN's passes fuse when they compile a graph is counted apart still.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ...compiler.buckets import Buckets
from ...compiler.choices import KV_FORMS, PlanError
from ...compiler.emit_ascend import DTYPES, emit
from ...compiler.ge_cost import FREE
from ...compiler.graphs import GraphContext, GraphDef, define_graph
from ...compiler.options import Options
from ...compiler.plan import make_plan
from ...model_defs.config import KV_CACHES, QUANTS, ClipConfig, ConfigError, ModelConfig, ResampledConfig, TiledConfig
from ...runtime.artifact import ArtifactError, GraphKey
from ...runtime.backends.ascend import torchair_host
from ...runtime.backends.ge_simulator import ge_graph
from ...weights.tensors import WeightsError
from ..command_errors import Parser
from ..known_models import MODELS
from .ascend_coverage import CONTEXT, any_image, named_config

PREFILL, DECODE, VERIFY = 64, 4, 4


@dataclass(frozen=True, slots=True)
class Form:
    """How graphs are compiled, as of the options of the same names."""

    quant: str = "none"
    kv_cache: str = KV_CACHES[0]
    tp: int = 1
    dtype: str = DTYPES[0]
    kv: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A kind of layer: a model, the same with one such layer more, and which graphs run it."""

    name: str
    model: ModelConfig
    deeper: ModelConfig
    vision: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """The kernels of a layer in a graph, by type, most frequent first."""

    graph: str
    layer: str
    types: dict[str, int]

    @property
    def kernels(self) -> int:
        return sum(self.types.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    form = Form(arguments.quant, arguments.kv_cache, arguments.tp, arguments.dtype, arguments.kv)
    try:
        torchair_host.load()
        for name in arguments.configs:
            for row in counts(named_config(name), form, arguments.graphs):
                print(_line(Path(name).name, row), flush=True)
    except (ArtifactError, ConfigError, PlanError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="staticvl.tools.development.kernel_count", description="Kernels of one layer of a model, as torchair makes them."
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG_FOLDER", help=f"a folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help=f"only these, e.g. decode-{DECODE} (default: all)")
    parser.add_argument("--quant", choices=QUANTS, default=QUANTS[0])
    parser.add_argument("--kv-cache", choices=KV_CACHES, default=KV_CACHES[0])
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="graphs of one rank of N (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--kv", choices=KV_FORMS, default="", help="default: that of the model")
    return parser


def _line(model: str, row: Counted) -> str:
    types = ", ".join(f"{name} {count}" for name, count in row.types.items())
    return f"{model:28} {row.graph:22} {row.layer:12} {row.kernels:4} kernels  {types}"


def counts(config: ModelConfig, form: Form, names: Sequence[str] | None = None) -> Iterator[Counted]:
    """The kernels of each kind of layer in each kind of graph, or in those of these names.

    Raises PlanError, and WeightsError for a model that cannot be cut so.
    """
    for layer in layers(config):
        models = [dict(_definitions(each, form)) for each in (layer.model, layer.deeper)]
        for key in models[0]:
            if (key.kind == "vision") == layer.vision and (not names or key.name in names):
                few, more = (_types(graphs[key], form.dtype) for graphs in models)
                added = {name: more[name] - few[name] for name in more if more[name] != few[name]}
                yield Counted(key.name, layer.name, dict(Counter(added).most_common()))


def layers(config: ModelConfig) -> Iterator[Layer]:
    """The kinds of layers of a model. The last layer computes less than others in some graphs, so it is not the one added."""
    crossing = bool(config.text.cross_layers)
    model = _deep(config, 3, crossing)
    yield Layer("layer", model, _deep(config, 4, crossing))
    if crossing:
        yield Layer("cross layer", model, replace(model, text=replace(model.text, layers=4, cross_layers=(1, 2))))
    yield Layer("tower layer", model, replace(model, vision=_deep_tower(config, 2)), vision=True)


def _deep(config: ModelConfig, depth: int, crossing: bool) -> ModelConfig:
    """The model with so many layers, the second of which attends to images if the model has such."""
    text = replace(config.text, layers=depth, cross_layers=(1,) if crossing else ())
    return replace(config, text=text, vision=_deep_tower(config, 1))


def _deep_tower(config: ModelConfig, depth: int) -> ClipConfig | TiledConfig | ResampledConfig:
    match config.vision:
        case ClipConfig() as vision:
            return replace(vision, layers=depth, used_layers=depth)
        case TiledConfig() as vision:
            return replace(vision, layers=depth, global_layers=1, taps=(0,))
        case vision:
            return replace(vision, layers=depth)


def _definitions(config: ModelConfig, form: Form) -> Iterator[tuple[GraphKey, GraphDef]]:
    """One graph of each kind."""
    buckets = Buckets(
        prefill=(PREFILL,),
        decode=(DECODE,),
        verify=(VERIFY,),
        images=(1,) if config.text.cross_layers else None,
        context=min(CONTEXT, config.text.max_positions),
        slots=DECODE,
    )
    return definitions(config, form, buckets)


def definitions(config: ModelConfig, form: Form, buckets: Buckets) -> Iterator[tuple[GraphKey, GraphDef]]:
    """The graphs of these buckets; of a model with cross-attention, text graphs that see images. Raises PlanError, and
    WeightsError for a model that cannot be cut so."""
    options = Options(
        checkpoint=Path(), out=Path(), backend="ascend", dtype=form.dtype, tp=form.tp, kv=form.kv, buckets=buckets
    )
    plan = make_plan(config, options)
    int8 = form.kv_cache == "int8"
    cache = msgspec.structs.replace(plan.cache, text_dtype="int8") if int8 else plan.cache
    context = GraphContext(
        config=replace(config, text=replace(config.text, int8_cache=int8)),
        image=any_image(config),
        cache=cache,
        quant=form.quant,
        ranks=form.tp,
        candidates=plan.candidates,
    )
    for key in plan.graphs:
        if key.images or key.kind == "vision" or not config.text.cross_layers:
            yield key, define_graph(context, key)


def _types(graph: GraphDef, dtype: str) -> Counter[str]:
    types = ge_graph.parse(emit(graph, dtype).graph).types()
    return Counter({name: count for name, count in types.items() if name not in FREE})


if __name__ == "__main__":
    sys.exit(main())
