"""The report as one HTML file: the choice against powers of two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from ..pages import document, drawn
from .choose import TuningResult
from .comparison import Coverage
from .frontiers import knee
from .replay import ReplayStats
from .report import PERCENTILES, percentile, times


def page(
    result: TuningResult,
    coverages: Sequence[Coverage],
    before: ReplayStats,
    tables: Sequence[Table],
    notes: Sequence[str],
    name: str,
) -> str:
    """The text of the file; the same for the same result."""
    plots = (
        ("Lengths of prompts, and the buckets", lambda axes: _lengths(axes, result)),
        ("Padding of prefill", lambda axes: _padding(axes, coverages)),
        ("Time to first token and per token, replayed", None),
        ("Cost against the number of prefill graphs", lambda axes: _frontier(axes, result)),
    )
    drawings = [(title, drawn(plot) if plot else _times(before, result.replayed)) for title, plot in plots]
    return document(f"Buckets for {name}", notes, drawings, tables)


def _lengths(axes, result: TuningResult) -> None:
    length_counts = result.workload.every_length
    sizes, counts = np.array(sorted(length_counts)), np.array([length_counts[n] for n in sorted(length_counts)])
    axes.hist(sizes, bins=np.geomspace(1, max(2, sizes[-1] + 1), 80), weights=counts, color="#9ab")
    axes.set_xscale("log", base=2)
    for bucket in result.chosen.prefill:
        axes.axvline(bucket, color="#c33", linewidth=1)
        axes.annotate(
            str(bucket), (bucket, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8
        )
    axes.set_xlabel("tokens to compute")
    axes.set_ylabel("requests")


def _padding(axes, coverages: Sequence[Coverage]) -> None:
    names = [each.name for each in coverages][::-1]
    shares = [100 * each.padding for each in coverages][::-1]
    bars = axes.barh(names, shares, color=["#9ab"] * (len(coverages) - 1) + ["#c33"])
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set_xlabel("percent of the tokens computed")
    axes.margins(x=0.15)


def _times(before: ReplayStats, after: ReplayStats) -> str:
    shown = {name: values for name, values in times(before, after).items() if name != "whole answer"}

    def draw(both) -> None:
        for axes, (name, (old, new)) in zip(both, shown.items(), strict=True):
            places = np.arange(len(PERCENTILES))
            for shift, values, label, colour in ((-0.2, old, "powers of two", "#9ab"), (0.2, new, "chosen", "#c33")):
                axes.bar(places + shift, [percentile(values, q) for q in PERCENTILES], 0.4, label=label, color=colour)
            axes.set_xticks(places, [f"{q} %" for q in PERCENTILES])
            axes.set_ylabel("seconds")
            axes.set_title(name)
            axes.legend()

    return drawn(draw, len(shown))


def _frontier(axes, result: TuningResult) -> None:
    costs = [best.cost / result.workload.requests for best in result.frontiers["prefill"]]
    graphs, position = range(1, len(costs) + 1), knee([best.cost for best in result.frontiers["prefill"]])
    axes.plot(graphs, costs, marker="o", color="#456")
    axes.plot([position + 1], [costs[position]], marker="o", markersize=12, fillstyle="none", color="#c33")
    axes.annotate("knee", (position + 1, costs[position]), xytext=(8, 12), textcoords="offset points", color="#c33")
    axes.set_xticks(list(graphs))
    axes.set_xlabel("prefill graphs")
    axes.set_ylabel("ms of prefill a request")
