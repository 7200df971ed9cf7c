"""The report of a choice: tables on the terminal, and buckets.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich.table import Table

from ...compiler.buckets import parse_buckets
from .choose import TuningResult
from .comparison import BucketReason, Coverage
from .frontiers import knee
from .replay import ReplayStats

PERCENTILES = (50, 90, 99)


def buckets_yaml(result: TuningResult, notes: Sequence[str]) -> str:
    """The file that `staticvl compile --buckets` takes, checked by its reader; `notes` stand above it as comments."""
    chosen = result.chosen
    data: dict[str, object] = {"prefill": list(chosen.prefill), "decode": list(chosen.decode)}
    if chosen.vision:
        data["vision"] = list(chosen.vision)
    if chosen.images:
        data["images"] = list(chosen.images)
    data |= {"context": chosen.context, "slots": chosen.slots}
    parse_buckets(data, "the chosen buckets")
    lines = [
        *(f"# {line}" for note in notes for line in note.splitlines()),
        *(f"{key}: {value}" for key, value in data.items()),
    ]
    return "\n".join(lines) + "\n"


def chosen_table(result: TuningResult) -> Table:
    chosen = result.chosen
    table = Table(title=f"chosen: {chosen.graphs} graphs", show_header=False, title_justify="left")
    rows = {
        "prefill": _numbers(chosen.prefill),
        "decode": _numbers(chosen.decode),
        "vision": _numbers(chosen.vision) or "as derived from the model (no images in the trace)",
        **({"images": _numbers(chosen.images)} if chosen.images else {}),
        "context": f"{chosen.context} tokens; {_dropped(result)}",
        "slots": str(chosen.slots),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _dropped(result: TuningResult) -> str:
    if not (dropped := result.workload.dropped):
        return "every request fits"
    total = dropped + result.workload.requests
    return f"{dropped} of {total} requests ({dropped / total:.2%}) are longer and would be refused"


def coverage_table(coverages: Sequence[Coverage]) -> Table:
    table = _table("prefill of all prompts", "", "graphs", "ms a request", "change", "padding", "runs a request")
    for each in coverages:
        change = "" if each is coverages[0] else f"{coverages[0].ms / each.ms - 1:+.1%}"
        figures = f"{each.ms:.4g}", change, f"{each.padding:.2%}", f"{each.runs:.2f}"
        table.add_row(each.name, str(len(each.buckets)), *figures)
    table.caption = "change: of the time, with the chosen buckets instead"
    return table


def replay_table(before: ReplayStats, after: ReplayStats) -> Table:
    table = _table("replay of arrivals", "", "powers of two, one run", "chosen")
    for name, of in times(before, after).items():
        for q in PERCENTILES:
            table.add_row(f"{name}, {q} % of requests within", *(f"{percentile(values, q):.4g} s" for values in of))
    rows = {
        "padding of prefill": lambda r: f"{r.padding('prefill'):.2%}",
        "padding of decode": lambda r: f"{r.padding('decode'):.2%}",
        "graphs running": lambda r: f"{r.load:.1%} of the time",
        "requests a second": lambda r: f"{len(r.total_s) / r.span_s:.4g}" if r.span_s else "-",
    }
    for name, show in rows.items():
        table.add_row(name, show(before), show(after))
    return table


def times(before: ReplayStats, after: ReplayStats) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> seconds of every request, before and after."""
    return {
        "first token": (before.first_token_s, after.first_token_s),
        "each later token": (before.per_token_s, after.per_token_s),
        "whole answer": (before.total_s, after.total_s),
    }


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")


def frontier_table(result: TuningResult) -> Table:
    table = _table("prefill by number of graphs", "graphs", "buckets", "ms a request", "saved by the last", "sets tried")
    frontier, requests = result.frontiers["prefill"], result.workload.requests
    knee_index = knee([best.cost for best in frontier])
    for i, best in enumerate(frontier):
        saved = f"{1 - best.cost / frontier[i - 1].cost:.2%}" if i else ""
        mark = " (knee)" if i == knee_index else ""
        table.add_row(f"{i + 1}{mark}", _numbers(best.buckets), f"{best.cost / requests:.4g}", saved, str(best.explored))
    return table


def reason_table(bucket_reasons: Iterable[BucketReason], cost_ms: Mapping[str, float]) -> Table:
    """The reason for every bucket. `spent`: milliseconds of a request by kind."""
    table = _table("saving of each bucket", "kind", "bucket", "share of runs", "without it a request takes longer by")
    for reason in bucket_reasons:
        if reason.saves_ms is None:
            without = "(the largest decode bucket must hold all slots)" if reason.kind == "decode" else "(cannot be left out)"
        else:
            without = f"{reason.saves_ms:.4g} ms ({reason.saves_ms / cost_ms[reason.kind]:.2%} of {reason.kind})"
        table.add_row(reason.kind, str(reason.bucket), f"{reason.share:.1%}", without)
    return table


def slots_table(result: TuningResult) -> Table:
    table = _table("slots", "slots", "mean seconds of a request in the replay")
    for slots, mean in result.slots_tried.items():
        table.add_row(f"{slots}{' (chosen)' if slots == result.chosen.slots else ''}", f"{mean:.4g}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _numbers(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
