"""How far a fault reaches: one bucket, one kind of graph, one number of tiles, one rank, quantised weights alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .findings import Finding
from .result import EdgeResult


def scope(edges: Sequence[EdgeResult], findings: Sequence[Finding], ranks: int, quant: str) -> list[str]:
    """Sentences, each only where there was something else that could have been wrong too."""
    # A case of one graph runs others before it: what was looked into says which graphs are wrong by themselves.
    graphs = {each.graph for each in findings if each.stage == "graph"} or {edge.graph for edge in edges if edge.broken}
    told = _of_graphs(edges, graphs) + _of_columns(edges, graphs)
    of_ranks = {each.rank for each in findings if each.rank is not None}
    if ranks > 1 and len(of_ranks) == 1:
        told.append(f"only rank {of_ranks.pop()} of {ranks} is at fault")
    weights = [each for each in findings if each.stage == "weights"]
    for bits in (8, 4):
        if quant != "none" and weights and all(f"stored in {bits} bits" in each.text for each in weights):
            told.append(f"only weights that are stored in {bits} bits are at fault")
    return told


def _of_graphs(edges: Sequence[EdgeResult], graphs: Collection[str]) -> list[str]:
    every = list(dict.fromkeys(edge.graph for edge in edges))
    wrong = [name for name in every if name in graphs]
    if not wrong or len(wrong) == len(every):
        return ["every graph is at fault"] if wrong else []
    if len(wrong) == 1:
        return [f"only {wrong[0]} is at fault, of {len(every)} graphs"]
    kinds = {name.partition("-")[0] for name in wrong}
    others = [name for name in every if name.partition("-")[0] in kinds]
    if len(kinds) == 1 and len(others) == len(wrong):
        return [f"only {kinds.pop()} graphs are at fault, all of them"]
    return [f"{len(wrong)} of {len(every)} graphs are at fault: {', '.join(wrong)}"]


def _of_columns(edges: Sequence[EdgeResult], graphs: Collection[str]) -> list[str]:
    """Cases of a graph of which some are right."""
    told = []
    for graph in dict.fromkeys(edge.graph for edge in edges if edge.broken and edge.graph in graphs):
        cases = [edge for edge in edges if edge.graph == graph]
        wrong = [edge.column for edge in cases if edge.broken]
        if len(cases) > 1 and len(wrong) < len(cases):
            told.append(f"{graph} is wrong only at {', '.join(wrong)} ({len(wrong)} of {len(cases)} cases)")
    return told
