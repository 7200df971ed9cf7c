"""The report as one HTML file that needs nothing else: tables as text, plots as drawings inside it. matplotlib is imported here
alone."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .choose import Result
from .comparison import Coverage
from .frontiers import knee
from .replay import Replayed
from .report import PERCENTILES, percentile, times

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em}"
    "pre{font:12px/1.3 monospace;overflow-x:auto}svg{max-width:100%;height:auto}"
)
_SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "staticvl", "font.size": 10, "figure.autolayout": True}


def page(
    result: Result, found: Sequence[Coverage], before: Replayed, tables: Sequence[Table], notes: Sequence[str], name: str
) -> str:
    """The whole file; the same for the same result."""
    plots = (
        ("Lengths of prompts, and the buckets", lambda axes: _lengths(axes, result)),
        ("Padding of prefill", lambda axes: _padding(axes, found)),
        ("Time to first token and per token, replayed", None),
        ("Cost against the number of prefill graphs", lambda axes: _frontier(axes, result)),
    )
    parts = [
        f"<h2>{html.escape(title)}</h2>\n{_drawn(plot) if plot else _times(before, result.replayed)}" for title, plot in plots
    ]
    console = Console(width=150, file=io.StringIO(), record=True, highlight=False)
    for table in tables:
        console.print(table)
        console.print()
    text = html.escape(console.export_text())
    paragraphs = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    title = html.escape(f"Buckets for {name}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n{paragraphs}{''.join(parts)}\n<h2>Figures</h2>\n<pre>{text}</pre>\n</body></html>\n"
    )


def _drawn(draw: Callable, columns: int = 1) -> str:
    """An SVG element of a figure whose axes `draw` fills."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.6))
        axes = figure.subplots(1, columns)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _lengths(axes, result: Result) -> None:
    counted = result.workload.every_length
    sizes, counts = np.array(sorted(counted)), np.array([counted[n] for n in sorted(counted)])
    axes.hist(sizes, bins=np.geomspace(1, max(2, sizes[-1] + 1), 80), weights=counts, color="#9ab")
    axes.set_xscale("log", base=2)
    for bucket in result.chosen.prefill:
        axes.axvline(bucket, color="#c33", linewidth=1)
        axes.annotate(
            str(bucket), (bucket, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=8
        )
    axes.set_xlabel("tokens to compute")
    axes.set_ylabel("requests")


def _padding(axes, found: Sequence[Coverage]) -> None:
    names = [each.name for each in found][::-1]
    shares = [100 * each.padding for each in found][::-1]
    bars = axes.barh(names, shares, color=["#9ab"] * (len(found) - 1) + ["#c33"])
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set_xlabel("percent of the tokens computed")
    axes.margins(x=0.15)


def _times(before: Replayed, after: Replayed) -> str:
    kept = {name: values for name, values in times(before, after).items() if name != "whole answer"}

    def draw(both) -> None:
        for axes, (name, (old, new)) in zip(both, kept.items(), strict=True):
            places = np.arange(len(PERCENTILES))
            for shift, values, label, colour in ((-0.2, old, "powers of two", "#9ab"), (0.2, new, "chosen", "#c33")):
                axes.bar(places + shift, [percentile(values, q) for q in PERCENTILES], 0.4, label=label, color=colour)
            axes.set_xticks(places, [f"{q} %" for q in PERCENTILES])
            axes.set_ylabel("seconds")
            axes.set_title(name)
            axes.legend()

    return _drawn(draw, len(kept))


def _frontier(axes, result: Result) -> None:
    costs = [best.cost / result.workload.requests for best in result.frontiers["prefill"]]
    graphs, at = range(1, len(costs) + 1), knee([best.cost for best in result.frontiers["prefill"]])
    axes.plot(graphs, costs, marker="o", color="#456")
    axes.plot([at + 1], [costs[at]], marker="o", markersize=12, fillstyle="none", color="#c33")
    axes.annotate("knee", (at + 1, costs[at]), xytext=(8, 12), textcoords="offset points", color="#c33")
    axes.set_xticks(list(graphs))
    axes.set_xlabel("prefill graphs")
    axes.set_ylabel("ms of prefill a request")
