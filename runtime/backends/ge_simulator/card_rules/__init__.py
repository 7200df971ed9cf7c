"""What a card takes: a table of rules over GE graphs, for the compiler, the simulator and `staticvl lint`.

    findings = lint(ge_graph.parse(data), "910B")

Nothing here needs torch, a card or weights: rules read dtypes, shapes, attributes and constants. Lengths and indices, which
exist only when a graph runs, are not looked at.
"""

from __future__ import annotations

from ..ge_graph import GeGraph, GeGraphError
from . import attention, cache, collectives, dtypes, faults, norms, pages, products, speed
from .rules import ANY, CARDS, RULES, Finding, Rule, by_type, findings
from .tensors import GraphView

__all__ = ["CARDS", "RULES", "Finding", "Rule", "lint", "refuse"]

# Imported for the rules that they register.
_SUBJECTS = (attention, cache, collectives, dtypes, faults, norms, pages, products, speed)


def lint(graph: GeGraph, card: str = CARDS[0]) -> tuple[Finding, ...]:
    """Everything that breaks a rule for one of CARDS, errors first, otherwise in the order of the graph."""
    table = by_type(card)
    broken = [
        finding
        for view in GraphView(graph)
        for finding in findings(view, [*table.get(ANY, ()), *table.get(view.node.type, ())])
    ]
    return tuple(sorted(broken, key=lambda finding: finding.rule.severity != "error"))


def refuse(graph: GeGraph, card: str = CARDS[0]) -> None:
    """Raise GeGraphError, with the first reason, for a graph that the card would not run as it is meant.

    What rules read is all in the graph, so one look is as good as one at every run.
    """
    errors = [finding for finding in lint(graph, card) if finding.rule.severity == "error"]
    if errors:
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise GeGraphError(f"{errors[0]}{others}")
