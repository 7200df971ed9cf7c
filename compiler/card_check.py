"""A lowered graph against the rules of its card, before anything of it is written."""

from __future__ import annotations

from collections import Counter

from ..runtime.backends.ge_simulator import card_rules
from ..runtime.backends.ge_simulator.ge_graph import GeGraph

CARDS = {"Ascend910B": "910B", "Ascend310P": "310P"}  # names of the rules' cards, by family of chips


class CardError(ValueError):
    """A graph that its card would refuse; the message names graph, node, rule, source and remedy."""


def check_card(name: str, graph: GeGraph, soc: str) -> dict[str, int]:
    """Warnings about a GE graph: how many nodes break which rule. Raises CardError for a node that breaks a rule
    whose severity is error."""
    findings = card_rules.lint(graph, CARDS[soc])
    errors = [finding for finding in findings if finding.rule.severity == "error"]
    if errors:
        others = f" ({len(errors) - 1} more nodes break rules)" if len(errors) > 1 else ""
        raise CardError(f"{name} cannot run on {soc}: {errors[0]}{others}")
    return dict(sorted(Counter(finding.rule.id for finding in findings).items()))
