"""Draw the figures of benchmarks.growth as four panels, for the documentation.

python -m benchmarks.growth_chart growth.json docs/growth.svg
"""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Distinguishable by colour-blind readers too (Okabe and Ito), and by their marks.
LINES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
GREY = "#555555"
UNITS = {
    "batch": "rows",
    "cache": "tokens in the cache",
    "prompt": "tokens of the prompt",
    "chunk": "tokens in the cache before the chunk",
}


def draw(data: dict[str, Any]) -> Figure:
    """Times with the bounds by memory (dashed) and by arithmetic (dotted); beside those of prompts, their rate."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 2).flat, UNITS, strict=True):
        _times(axes, data, panel)
        if panel == "prompt":
            _rates(axes.twinx(), data)
    figure.legend(handles=_legend(data), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _times(axes: Axes, data: dict[str, Any], panel: str) -> None:
    for (colour, mark), side in zip(cycle(LINES), data["artifacts"].values(), strict=False):
        points = side["points"][panel]
        sizes = [point["size"] for point in points]
        axes.plot(sizes, [point["ms"] for point in points], color=colour, marker=mark, markersize=4)
        axes.plot(sizes, [point["memory_ms"] for point in points], color=colour, linestyle="--", linewidth=1)
        axes.plot(sizes, [point["arithmetic_ms"] for point in points], color=colour, linestyle=":", linewidth=1)
        if panel == "batch":
            axes.set_xticks(sizes)
    chunks = " or ".join(str(size) for size in sorted({side["chunk"] for side in data["artifacts"].values()}))
    title = f"one chunk of {chunks}, by tokens before it" if panel == "chunk" else data["panels"][panel]
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(UNITS[panel])
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _rates(axes: Axes, data: dict[str, Any]) -> None:
    """On an axis of their own, on the right."""
    for (colour, _), side in zip(cycle(LINES), data["artifacts"].values(), strict=False):
        points = side["points"]["prompt"]
        rates = [point["tokens_per_s"] for point in points]
        axes.plot([point["size"] for point in points], rates, color=colour, linewidth=3, alpha=0.25)
    axes.set_ylabel("tokens/s (broad, pale)")
    axes.set_ylim(bottom=0)
    axes.spines[["top"]].set_visible(False)


def _legend(data: dict[str, Any]) -> list[Line2D]:
    styles = zip(cycle(LINES), data["artifacts"], strict=False)
    sides = [Line2D([], [], color=colour, marker=mark, markersize=4, label=name) for (colour, mark), name in styles]
    bounds = (("--", "bound by memory"), (":", "bound by arithmetic"))
    return [*sides, *(Line2D([], [], color=GREY, linestyle=style, linewidth=1, label=name) for style, name in bounds)]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.growth_chart GROWTH.json CHART.svg")
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).savefig(sys.argv[2])


if __name__ == "__main__":
    main()
