"""Draw the figures of a report as bars, for the documentation.

python -m benchmarks.peers.chart report.json docs/performance.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

OURS, PEER = "#1b6ca8", "#b8bec4"


def draw(data: dict[str, Any]) -> Figure:
    """One row of bars for each measure that is a rate; contestants whose answers are wrong are left out."""
    names = [name for name, unit in data["units"].items() if unit != "s"]
    figure = Figure(figsize=(9, 0.4 + 2.4 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        bars = {
            who: entry["figures"][name]
            for who, entry in data["contestants"].items()
            if name in entry["figures"] and entry["answer"] and entry["answer"]["right"]
        }
        colours = [OURS if who.startswith("staticvl") else PEER for who in bars]
        drawn = axes.barh(list(bars), list(bars.values()), color=colours)
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.invert_yaxis()
        axes.set_title(f"{name} ({data['units'][name]})", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m benchmarks.peers.chart REPORT.json CHART.svg")
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))).savefig(sys.argv[2])


if __name__ == "__main__":
    main()
