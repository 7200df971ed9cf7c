"""The report of a comparison as text: whether it passed, the fault, and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .result import ComparisonResult, EdgeResult, SampleResult


def conclusion(result: ComparisonResult) -> list[str]:
    """The lines of the conclusion, the most important first."""
    lines = [f"{result.candidate} against {result.reference}, limits of {result.precision}"]
    if result.passed:
        return lines + _passed(result)
    lines.append(f"FAILED: {len(result.broken)} limits broken, {len(result.findings)} causes")
    if first := result.first:
        lines.append(f"fault in {first.side}'s {NOUNS[first.stage]}: {first.text}")
        if result.samples and not result.broken:
            lines.append("it differs, without effect at these prompts: every limit of the logits holds")
    elif result.rounding:
        lines.append(result.rounding)
    else:
        lines.append("no single cause: no operator is wrong by itself" if result.layers else "causes were not searched for")
    lines += [f"also: {each.text}" for each in result.findings if each is not first][:MAX_CAUSES]
    if len(result.findings) > MAX_CAUSES + 1:
        lines.append(f"and {len(result.findings) - MAX_CAUSES - 1} more causes, in the JSON")
    lines += result.scope
    return lines


def _passed(result: ComparisonResult) -> list[str]:
    worst = max(each.figures.relative for each in result.samples)
    cases = f"{len(result.samples)} samples" + (f" and {len(result.edges)} edge cases" if result.edges else "")
    error = f"the largest relative error of logits is {worst:.1e}"
    if result.rounding:
        return [f"passed: {cases}, {len(result.broken)} limits broken by rounding alone; {error}", result.rounding]
    return [f"passed: {cases} within the limits; {error}"]


MAX_CAUSES = 6  # beside the first
NOUNS = {
    "settings": "settings",
    "weights": "weights",
    "inputs": "inputs",
    "feeds": "steps",
    "graph": "graphs",
    "definition": "definition",
}


def sample_table(samples: Sequence[SampleResult]) -> Table:
    table = Table(title="Forced tokens: candidate against reference")
    for name in ("sample", "positions", "tokens", "top 5", "top 50", "all", "KL", "cosine", "top-1", "perplexity", "diverges"):
        table.add_column(name, justify="left" if name in ("sample", "diverges") else "right")
    for each in samples:
        f = each.figures
        bands = {band.top: f"{band.relative:.1e}" for band in f.bands}
        divergence = "-"
        if d := f.divergence:
            margins = f"{d.reference_margin:.3g} and {d.candidate_margin:.3g}"
            divergence = f"{d.position}: {d.reference_text!r}, {d.candidate_text!r} by {margins}"
        table.add_row(
            each.name + (" *" if each.broken else ""), str(each.positions), str(len(each.tokens)), bands.get(5, "-"),
            bands.get(50, "-"), bands[None], f"{f.kl:.1e}", f"{f.cosine:.6f}", f"{f.agreement:.1%}",
            f"{f.reference_perplexity:.4g} / {f.candidate_perplexity:.4g}", divergence,
        )  # fmt: skip
    return table


def score_table(samples: Sequence[SampleResult]) -> Table | None:
    """Scores of samples with right answers; None where there are none."""
    scored = [(each.name, each.scores) for each in samples if each.scores]
    if not scored:
        return None
    table = Table(title="Against the right answers: reference / candidate")
    for name in ("sample", "exact match", "IoU of boxes"):
        table.add_column(name)
    for name, s in scored:
        exact = "-" if s.reference_exact is None else f"{_yes(s.reference_exact)} / {_yes(s.candidate_exact)}"
        iou = "-" if s.reference_iou is None else f"{s.reference_iou:.3f} / {s.candidate_iou:.3f}"
        table.add_row(name, exact, iou)
    return table


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"


def edge_table(edges: Sequence[EdgeResult]) -> Table | None:
    """Errors of every graph at its edges; None where these were not run."""
    if not edges:
        return None
    columns = list(dict.fromkeys(edge.column for edge in edges))
    table = Table(title="Relative error of logits, every graph at its edges")
    table.add_column("graph")
    for column in columns:
        table.add_column(column, justify="right")
    for graph in dict.fromkeys(edge.graph for edge in edges):
        cells = {e.column: f"{e.error:.1e}" + (" *" if e.broken else "") for e in edges if e.graph == graph}
        table.add_row(graph, *(cells.get(column, "") for column in columns))
    return table


def layer_table(result: ComparisonResult) -> Table | None:
    """Errors of the inspected graph by layer; None where none was inspected."""
    if not result.layers:
        return None
    table = Table(title=f"Errors by layer: {result.inspected}")
    for name in ("layer", "of its own operators", "carried to its end"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer, (own, drift) in result.layers.items():
        table.add_row(layer, f"{own:.1e}", f"{drift:.1e}")
    return table


def tables(result: ComparisonResult) -> list[Table]:
    optional_tables = (sample_table(result.samples), score_table(result.samples), edge_table(result.edges), layer_table(result))
    return [table for table in optional_tables if table is not None]
