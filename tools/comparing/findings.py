"""What was found to be wrong, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# In the order in which a model computes: what comes first explains what comes behind.
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

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {name: getattr(self, name) for name in ("stage", "where", "text", "side", "graph", "error", "rank")}
        return found | {"shape": list(self.shape)}
