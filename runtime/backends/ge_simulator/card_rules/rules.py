"""The table of rules: what a card takes of each operator, one row and one small function each.

    @card_rule("rope.width", "RotaryMul", what="...", source="...", remedy="...")
    def _(node: NodeView) -> Fault: ...

A function gets a node of one of the rule's types and says what is wrong with it, in a few words, or None. What it cannot see, a
shape or dtype that is open, it leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from .tensors import NodeView

CARDS = ("910B", "310P")
Severity = Literal["error", "warning"]
Fault = str | None
ANY = "any"  # in place of operator types: every node
TRANSFORMER, NN, GE = "hicann/ops-transformer", "hicann/ops-nn", "hicann/ge"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. An error: a card refuses the node, or computes something else. A warning: it computes it slowly, or a known
    fault of some CANN versions touches it.

    `cann` says for which versions it was read, or which have the fault; `source` is a repository and a path in it.
    """

    id: str
    types: tuple[str, ...]
    what: str
    source: str
    remedy: str
    check: Callable[[NodeView], Fault]
    cards: tuple[str, ...] = CARDS
    severity: Severity = "error"
    cann: str = "9.0"
    known_fault: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A node that breaks a rule."""

    rule: Rule
    type: str
    node: str
    observed: str

    def __str__(self) -> str:
        rule = self.rule
        return f"{self.type} {self.node}: {self.observed}; {rule.what} ({rule.id}, {rule.source}): {rule.remedy}"


RULES: dict[str, Rule] = {}


def card_rule(name: str, *types: str, **columns: object) -> Callable[[Callable[[NodeView], Fault]], Rule]:
    """Register a function as a rule for nodes of these types; `columns` are those of Rule."""

    def register(check: Callable[[NodeView], Fault]) -> Rule:
        assert name not in RULES, name
        RULES[name] = Rule(name, types, check=check, **columns)  # type: ignore[arg-type]
        return RULES[name]

    return register


def by_type(card: str) -> dict[str, list[Rule]]:
    """The rules of a card by operator type, ANY among them."""
    table: dict[str, list[Rule]] = {}
    for rule in RULES.values():
        for name in rule.types if card in rule.cards else ():
            table.setdefault(name, []).append(rule)
    return table


def findings(view: NodeView, rules: list[Rule]) -> Iterator[Finding]:
    """What these rules find at one node."""
    for rule in rules:
        fault = rule.check(view)
        if fault:
            yield Finding(rule, view.node.type, view.node.name, fault)
