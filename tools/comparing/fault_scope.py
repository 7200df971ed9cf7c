"""The scope of a fault: one bucket, one kind of graph, one number of tiles, one rank, quantised weights alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .findings import Finding
from .result import EdgeResult


def fault_scope(edges: Sequence[EdgeResult], findings: Sequence[Finding], ranks: int, quant: str) -> list[str]:
    """Sentences about the scope, each only where other parts were checked too."""
    # A case of one graph runs others before it: inspected operators tell which graphs are wrong by themselves.
    graphs = {each.graph for each in findings if each.stage == "graph"} or {edge.graph for edge in edges if edge.broken}
    sentences = _of_graphs(edges, graphs) + _of_columns(edges, graphs)
    faulty_ranks = {each.rank for each in findings if each.rank is not None}
    if ranks > 1 and len(faulty_ranks) == 1:
        sentences.append(f"only rank {faulty_ranks.pop()} of {ranks} is at fault")
    weights = [each for each in findings if each.stage == "weights"]
    for bits in (8, 4):
        if quant != "none" and weights and all(f"stored in {bits} bits" in each.text for each in weights):
            sentences.append(f"only weights that are stored in {bits} bits are at fault")
    return sentences


def _of_graphs(edges: Sequence[EdgeResult], graphs: Collection[str]) -> list[str]:
    all_graphs = list(dict.fromkeys(edge.graph for edge in edges))
    wrong = [name for name in all_graphs if name in graphs]
    if not wrong or len(wrong) == len(all_graphs):
        return ["every graph is at fault"] if wrong else []
    if len(wrong) == 1:
        return [f"only {wrong[0]} is at fault, of {len(all_graphs)} graphs"]
    kinds = {name.partition("-")[0] for name in wrong}
    others = [name for name in all_graphs if name.partition("-")[0] in kinds]
    if len(kinds) == 1 and len(others) == len(wrong):
        return [f"only {kinds.pop()} graphs are at fault, all of them"]
    return [f"{len(wrong)} of {len(all_graphs)} graphs are at fault: {', '.join(wrong)}"]


def _of_columns(edges: Sequence[EdgeResult], graphs: Collection[str]) -> list[str]:
    """Sentences about graphs of which some cases are right."""
    sentences = []
    for graph in dict.fromkeys(edge.graph for edge in edges if edge.broken and edge.graph in graphs):
        cases = [edge for edge in edges if edge.graph == graph]
        wrong = [edge.column for edge in cases if edge.broken]
        if len(cases) > 1 and len(wrong) < len(cases):
            sentences.append(f"{graph} is wrong only at {', '.join(wrong)} ({len(wrong)} of {len(cases)} cases)")
    return sentences
