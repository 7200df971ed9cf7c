"""Findings of a comparison: faults and their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# In the order in which a model computes: a fault of an earlier stage explains those of later ones.
STAGES = ("settings", "weights", "inputs", "feeds", "graph", "definition")
Stage = Literal["settings", "weights", "inputs", "feeds", "graph", "definition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong. `where` names it: a setting, a tensor, an input, an operator with its module, a module."""

    stage: Stage
    where: str
    text: str  # a sentence with the figures
    side: str = "candidate"
    graph: str = ""  # the compiled graph, where there is one
    error: float | None = None
    shape: tuple[int, ...] = ()
    rank: int | None = None
    reason: str = ""  # the clause of the text that explains it

    def plain(self) -> dict[str, Any]:
        """The finding as JSON types."""
        fields = {name: getattr(self, name) for name in ("stage", "where", "text", "side", "graph", "error", "rank")}
        return fields | {"shape": list(self.shape)}
