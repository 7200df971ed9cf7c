"""The report as one HTML file: errors by layer, by token, and of every bucket at its edges."""

from __future__ import annotations

import datetime
import math

import numpy as np

from ..machine import described, machine, versions
from ..pages import document, drawn
from .report import conclusion, tables
from .result import ComparisonResult, SampleResult

TINY = 1e-9  # nothing smaller is drawn
SHOWN = 6  # samples in the timeline


def page(result: ComparisonResult, made: str = "") -> str:
    """The text of the file; the same for the same result. `made`: a line about when and where it was made."""
    plots = []
    if result.layers or any(each.layers for each in result.samples):
        plots.append(("Error by layer", drawn(lambda axes: _layers(axes, result))))
    if shown := sorted(result.samples, key=lambda each: -each.figures.relative)[:SHOWN]:
        height = 1.2 + 0.9 * len(shown)
        plots.append(
            ("Errors token by token, the worst samples", drawn(lambda axes: _timeline(axes, shown, result), height=height))
        )
    if result.edges:
        height = 1.4 + 0.34 * len({edge.graph for edge in result.edges})
        plots.append(("Every graph at its edges", drawn(lambda axes: _heat(axes, result), height=height)))
    title, summary, *others = conclusion(result)
    fault = others.pop(0) if result.first else ""
    first = f"{summary}. {fault[:1].upper()}{fault[1:]}" if fault else summary
    return document("Comparison", [title, *others, *result.notes], plots, tables(result), first=first, made=made)


def made_here(now: datetime.date) -> str:
    """A line with the date, the machine and the versions of what computes."""
    names = ("python", "staticvl", "torch", "onnxruntime", "transformers", "numpy")
    known = {name: text for name, text in versions().items() if name in names and text}
    computed = ", ".join(f"{name} {text}" for name, text in known.items())
    return f"made on {now.isoformat()}, {described(machine())}; {computed}"


def _layers(axes, result: ComparisonResult) -> None:
    """Errors by layer of the inspected graph, or else of the keys and values of every sample."""
    if result.layers:
        names = [*result.layers]
        places = np.arange(len(names))
        axes.plot(places, [_drawable(drift) for _, drift in result.layers.values()], marker=".", label="carried", color="#9ab")
        axes.plot(places, [_drawable(own) for own, _ in result.layers.values()], marker="o", label="its own", color="#c33")
        axes.set_xticks(places, names, rotation=60, ha="right", fontsize=7)
        axes.set_title(result.inspected, fontsize=9)
        axes.legend()
    else:
        for each in result.samples:
            axes.plot([_drawable(error) for error in each.layers], marker=".", color="#456", alpha=0.6)
        axes.xaxis.get_major_locator().set_params(integer=True)  # a layer has a whole number
        axes.set_xlabel("layer that attends to the text")
        axes.set_title("keys and values in the cache, a line for each sample", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")


def _timeline(axes, shown: list[SampleResult], result: ComparisonResult) -> None:
    """A row for each sample, a cell for each forced token; a cross where the sides choose differently."""
    longest = max(len(each.tokens) for each in shown)
    cells = np.full((len(shown), longest), np.nan)
    for row, each in enumerate(shown):
        cells[row, : len(each.tokens)] = np.log10([_drawable(error) for error in each.figures.row_errors])
        for column, token in enumerate(each.tokens[:24]):
            colour = _ink(each.figures.row_errors[column])
            axes.text(column, row, token[:6].replace("$", r"\$"), fontsize=5, ha="center", va="center", color=colour)
        if each.figures.divergence:
            position = each.figures.divergence.position
            axes.plot([position], [row], marker="x", markersize=14, color="#04a")
    image = axes.imshow(cells, aspect="auto", cmap="YlOrRd", vmin=-8, vmax=0)
    axes.set_yticks(range(len(shown)), [each.name for each in shown])
    axes.set_xlabel("forced token")
    axes.figure.colorbar(image, ax=axes, label="log10 of the relative error")


def _heat(axes, result: ComparisonResult) -> None:
    graphs = list(dict.fromkeys(edge.graph for edge in result.edges))
    columns = list(dict.fromkeys(edge.column for edge in result.edges))
    cells = np.full((len(graphs), len(columns)), np.nan)
    for edge in result.edges:
        row, column = graphs.index(edge.graph), columns.index(edge.column)
        cells[row, column] = math.log10(_drawable(edge.error))
        weight = "bold" if edge.broken else "normal"
        text = f"{edge.error:.0e}" + (" *" if edge.broken else "")
        axes.text(column, row, text, fontsize=8, ha="center", va="center", color=_ink(edge.error), fontweight=weight)
    image = axes.imshow(cells, aspect="auto", cmap="YlOrRd", vmin=-8, vmax=0)
    axes.set_yticks(range(len(graphs)), graphs)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.figure.colorbar(image, ax=axes, label="log10 of the relative error")


def _ink(error: float) -> str:
    """A text colour that is readable on a cell."""
    return "#fff" if _drawable(error) > 1e-2 else "#222"


def _drawable(error: float) -> float:
    return min(max(error, TINY), 1e3) if math.isfinite(error) else 1e3
