"""The report as JSON and as tables: figures, and how many times faster each of ours is than each peer."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .match import Entry, relative
from .measures import Measure


def as_data(entries: Sequence[Entry], measures: Sequence[Measure], machine: dict[str, Any]) -> dict[str, Any]:
    """Plain data. Figures are medians in the unit of their measure, ratios above 1 mean that ours is faster."""
    return {
        "machine": machine,
        "units": {measure.name: measure.unit for measure in measures},
        "contestants": {entry.contestant.name: _contestant(entry, measures) for entry in entries},
        "ratios": {
            measure.name: {
                ours.contestant.name: {
                    theirs.contestant.name: round(ratio, 3)
                    for theirs in entries
                    if not theirs.contestant.is_ours and (ratio := relative(ours, theirs, measure.name)) is not None
                }
                for ours in entries
                if ours.contestant.is_ours and ours.seconds.get(measure.name)
            }
            for measure in measures
        },
    }


def _contestant(entry: Entry, measures: Sequence[Measure]) -> dict[str, Any]:
    return {
        "versions": entry.versions,
        "notes": entry.notes,
        "answer": dataclasses.asdict(entry.answer) | {"right": entry.answer.right} if entry.answer else None,
        "load_to_first_token_s": entry.load_s and round(entry.load_s, 2),
        "pss_mb": entry.pss_mb and round(entry.pss_mb, 1),
        "figures": {m.name: float(f"{m.figure(median):.4g}") for m in measures if (median := entry.median(m.name))},
        "spread": {
            name: round((max(times) - min(times)) / statistics.median(times), 3) for name, times in entry.seconds.items()
        },
        "seconds": {name: [round(value, 5) for value in times] for name, times in entry.seconds.items()},
    }


def show(console: Console, data: dict[str, Any]) -> None:
    """Figures of all contestants, then ratios, then notes."""
    names = list(data["units"])
    figures = Table(title="medians")
    for column in ("", *(f"{name}\n{data['units'][name]}" for name in names), "load\ns", "PSS\nMB", "distance\nof logits"):
        figures.add_column(column, justify="right")
    for name, entry in data["contestants"].items():
        values = [f"{entry['figures'][m]:.4g}" if m in entry["figures"] else "" for m in names]
        rest = [f"{entry[key]:.0f}" if entry[key] else "" for key in ("load_to_first_token_s", "pss_mb")]
        figures.add_row(name, *values, *rest, _answer(entry["answer"]))
    console.print(figures)
    ratios = Table(title="ours / peer: above 1, ours is faster")
    for column in ("ours", "peer", *names):
        ratios.add_column(column, justify="right")
    for ours, theirs in dict.fromkeys((o, t) for by_ours in data["ratios"].values() for o, row in by_ours.items() for t in row):
        row = [data["ratios"][m].get(ours, {}).get(theirs) for m in names]
        ratios.add_row(ours, theirs, *(f"{value:.2f}" if value is not None else "" for value in row))
    console.print(ratios)
    for name, entry in data["contestants"].items():
        for note in entry["notes"]:
            console.print(f"{name}: {note}")
    console.print(
        f"memory is read at {data['machine']['read_gb_per_s']} GB/s with {data['machine']['threads']} threads; the load before "
        f"the start was {data['machine']['load']:.1f}"
    )


def _answer(answer: dict[str, Any] | None) -> str:
    return f"{answer['distance']:.2g}{'' if answer['right'] else ' WRONG'}" if answer else ""
