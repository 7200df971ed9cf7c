"""Kernels, bytes and time of a model's Ascend graphs at full size, by quantisation, as tables.

    python -m staticvl.tools.development.ascend_forecast CONFIG_FOLDER... --counts FILE [--markdown FILE [--before FILE]]

Counts are those of compiler/ge_cost.py. Every layer of a kind adds alike to a graph: so the graphs of a few layers are made,
those of one layer more, and the difference is multiplied. --counts keeps the counts; --before takes those of another version,
for tables that show both. Without CONFIG_FOLDER, tables are made of kept counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...compiler.buckets import Buckets
from ...compiler.choices import PlanError
from ...compiler.emit_ascend import emit
from ...compiler.ge_cost import serialised_cost
from ...model_defs.config import ConfigError, ModelConfig
from ...runtime.artifact import ArtifactError, GraphKey, LoweredCost
from ...runtime.backends.ascend import torchair_host
from ...runtime.files import write_atomically
from ...weights.tensors import WeightsError
from ..cards import CARDS, KERNEL_US, Card
from ..command_errors import Parser
from .ascend_coverage import CONTEXT, named_config
from .kernel_count import Form, definitions, layers

PREFILL, DECODE = (512,), (1, 8, 32)
QUANTS = ("none", "w8a8", "w8a16", "w4a16")
HEAD = ("graph", "weights", "kernels", "GB", "ms", "ms with kernels")


class Row(msgspec.Struct, frozen=True):
    """The work of one graph of a model."""

    model: str
    graph: str
    quant: str
    cost: LoweredCost

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.graph, self.quant


@dataclass(frozen=True, slots=True)
class Graphs:
    """The kinds of graphs to count."""

    quants: Sequence[str] = QUANTS
    prefill: Sequence[int] = PREFILL
    decode: Sequence[int] = DECODE


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        rows = _counted(arguments) if arguments.configs else read_counts(arguments.counts)
        before = read_counts(arguments.before) if arguments.before else []
    except (ArtifactError, ConfigError, PlanError, WeightsError, OSError, msgspec.DecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.configs:
        lines = b",\n".join(msgspec.json.encode(row) for row in rows)
        write_atomically(arguments.counts, b"[\n" + lines + b"\n]\n")
    text = markdown(rows, CARDS[arguments.card], {row.key: row.cost for row in before})
    if arguments.markdown:
        write_atomically(arguments.markdown, text.encode())
    else:
        print(text, end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="staticvl.tools.development.ascend_forecast",
        description="Kernels, bytes and time of a model's Ascend graphs at full size, by quantisation.",
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG_FOLDER", help="folders or known models; none: --counts is read")
    parser.add_argument("--counts", type=Path, required=True, metavar="FILE", help="JSON that keeps the counts")
    parser.add_argument("--before", type=Path, metavar="FILE", help="counts of another version, shown before the others")
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=QUANTS)
    parser.add_argument("--card", choices=CARDS, default=next(iter(CARDS)))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here (default: print them)")
    return parser


def _counted(arguments: argparse.Namespace) -> list[Row]:
    torchair_host.load()
    rows = []
    for folder in arguments.configs:
        for row in counted(Path(folder).name, named_config(folder), Graphs(arguments.quants)):
            print(f"{row.model} {row.graph} {row.quant}: {row.cost.kernels} kernels", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def read_counts(file: Path) -> list[Row]:
    """Raises OSError and msgspec.DecodeError."""
    return msgspec.json.decode(file.read_bytes(), type=list[Row])


# ---- counts


def counted(model: str, config: ModelConfig, graphs: Graphs) -> Iterator[Row]:
    """The text graphs of a model. Raises PlanError, and WeightsError for a model that cannot be cut so."""
    for quant in graphs.quants:
        for key, cost in text_costs(config, Form(quant), graphs).items():
            yield Row(model, key.name, quant, cost)


def text_costs(config: ModelConfig, form: Form, graphs: Graphs) -> dict[GraphKey, LoweredCost]:
    """The cost of each text graph of the whole model: of a few layers, and what each further layer of a kind adds."""
    kinds = [layer for layer in layers(config) if not layer.vision]
    base = kinds[0].model
    costs = _costs(base, form, graphs)
    total = dict(costs)
    for kind in kinds:
        crossing = len(kind.deeper.text.cross_layers) > len(base.text.cross_layers)
        missing = _depth(config, crossing) - _depth(base, crossing)
        for key, more in _costs(kind.deeper, form, graphs).items():
            total[key] = _combined(total[key], missing, more, costs[key])
    return total


def _depth(config: ModelConfig, crossing: bool) -> int:
    return len(config.text.cross_layers) if crossing else config.text.self_layers


def _costs(config: ModelConfig, form: Form, graphs: Graphs) -> dict[GraphKey, LoweredCost]:
    graphs_of_form = definitions(config, form, buckets(config, graphs))
    keys = {("prefill", bucket) for bucket in graphs.prefill} | {("decode", bucket) for bucket in graphs.decode}
    return {key: serialised_cost(emit(graph, form.dtype).graph) for key, graph in graphs_of_form if key[:2] in keys}


def buckets(config: ModelConfig, graphs: Graphs) -> Buckets:
    """One image in a sequence where images enter by cross-attention; a slot for each row of the largest decode bucket."""
    return Buckets(
        prefill=tuple(graphs.prefill or PREFILL),
        decode=tuple(graphs.decode or DECODE),
        images=(1,) if config.text.cross_layers else None,
        context=min(CONTEXT, config.text.max_positions),
        slots=max(graphs.decode or DECODE),
    )


def _combined(total: LoweredCost, times: int, more: LoweredCost, less: LoweredCost) -> LoweredCost:
    """total + times * (more - less)"""
    fields = msgspec.structs.asdict(total)
    return LoweredCost(**{name: value + times * (getattr(more, name) - getattr(less, name)) for name, value in fields.items()})


# ---- tables


def markdown(rows: Sequence[Row], card: Card, before: Mapping[tuple[str, str, str], LoweredCost] | None = None) -> str:
    """A table for each model, with what it holds."""
    parts = [_caption(card, bool(before))]
    for model in dict.fromkeys(row.model for row in rows):
        cells = [_cells(row, card, (before or {}).get(row.key)) for row in rows if row.model == model]
        parts.append("\n".join([f"**{model}**", "", *map(_line, [HEAD, ["---"] * 2 + ["--:"] * 4, *cells])]))
    return "\n\n".join(parts) + "\n"


def _caption(card: Card, compared: bool) -> str:
    rows = CONTEXT + max(PREFILL)  # a chunk may be written beyond the context
    return f"{card.name}; {KERNEL_US:g} us a kernel; a cache of {rows:,} tokens a row, all read." + (
        "\nAn arrow: before, then now." if compared else ""
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, card: Card, before: LoweredCost | None) -> list[str]:
    both = [_figures(cost, card) for cost in (before, row.cost) if cost]
    return [row.graph, row.quant, *(" → ".join(dict.fromkeys(figures)) for figures in zip(*both, strict=True))]


def _figures(cost: LoweredCost, card: Card) -> tuple[str, ...]:
    bound, launched = card.bound_ms(cost.flops, cost.nbytes), card.run_ms(cost.flops, cost.nbytes, cost.kernels)
    return f"{cost.kernels:,}", f"{cost.nbytes / 1e9:.2f}", f"{bound:.2f}", f"{launched:.2f}"


if __name__ == "__main__":
    sys.exit(main())
