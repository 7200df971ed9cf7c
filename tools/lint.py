"""`staticvl lint`: what a card refuses of an artifact's graphs, and what it computes slowly."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiler.card_check import CARDS
from ..runtime.artifact import ArtifactError, GraphSpec, Manifest, Segment, open_artifact
from ..runtime.backends.ascend import torchair_host
from ..runtime.backends.ascend.kernel import ascend_info, check_ascend_info, load_graph
from ..runtime.backends.ge_simulator import card_rules, ge_graph

NAMED = 3  # nodes of a graph that are named without --json
WIDTH = 100


@dataclass(frozen=True, slots=True)
class GraphFinding:
    """A finding in one graph of the artifact."""

    graph: str
    finding: card_rules.Finding


def run(args: argparse.Namespace) -> int:
    manifest = open_artifact(args.artifact).manifest
    if manifest.ascend is None:
        raise ArtifactError(
            f"{args.artifact} was compiled for {manifest.backend}, and cards are Ascend's; compile it with --backend ascend"
        )
    torchair_host.load()
    check_ascend_info(args.artifact, manifest, ascend_info(torchair_host.VERSION, manifest.ascend.soc))
    card = args.card or CARDS[manifest.ascend.soc]
    findings = list(_findings(args.artifact, manifest, card))
    report = Report(args.artifact, manifest, card, findings)
    print(json.dumps(report.data()) if args.json else "\n".join(report.lines()))
    return 1 if report.count("error") else 0


def _findings(folder: Path, manifest: Manifest, card: str) -> Iterator[GraphFinding]:
    for name, graph in _graphs(manifest):
        if not graph.eager:
            file = next(step.file for step in graph.plan if isinstance(step, Segment))
            parsed = ge_graph.parse(load_graph(folder / file, manifest.files[file]))
            yield from (GraphFinding(name, finding) for finding in card_rules.lint(parsed, card))


def _graphs(manifest: Manifest) -> Iterator[tuple[str, GraphSpec]]:
    """The graphs of all stages, by name."""
    for stage in range(manifest.pp):
        for graph in manifest.of_stage(stage).graphs:
            yield (f"{graph.name} of stage {stage}" if manifest.pp > 1 else graph.name), graph


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of an artifact."""

    folder: Path
    manifest: Manifest
    card: str
    findings: Sequence[GraphFinding]

    def count(self, severity: str) -> int:
        return sum(each.finding.rule.severity == severity for each in self.findings)

    def by_rule(self) -> dict[str, list[GraphFinding]]:
        """Errors first, then by the number of nodes."""
        groups: dict[str, list[GraphFinding]] = {}
        for each in self.findings:
            groups.setdefault(each.finding.rule.id, []).append(each)
        return dict(sorted(groups.items(), key=lambda item: (item[1][0].finding.rule.severity, -len(item[1]))))

    def data(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "card": self.card,
            "graphs": [name for name, graph in _graphs(self.manifest) if not graph.eager],
            "eager": [name for name, graph in _graphs(self.manifest) if graph.eager],
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "rules": [_rule_data(group) for group in self.by_rule().values()],
        }

    def lines(self) -> Iterator[str]:
        """Everything but the names of most nodes, for readers."""
        data = self.data()
        kinds = f"{len(data['graphs'])} compiled graphs on {self.card}"
        yield f"{self.folder}: {kinds}: {data['errors']} errors, {data['warnings']} warnings"
        if data["eager"]:
            yield f"{len(data['eager'])} graphs run op by op, which rules say nothing of: {', '.join(data['eager'])}"
        for group in self.by_rule().values():
            yield ""
            yield from _rule_lines(group)


def _rule_data(group: Sequence[GraphFinding]) -> dict[str, Any]:
    rule = group[0].finding.rule
    names = ("id", "severity", "what", "source", "remedy", "cann", "known_fault")
    nodes = [{"graph": f.graph, "type": f.finding.type, "node": f.finding.node, "observed": f.finding.observed} for f in group]
    return {**{name: getattr(rule, name) for name in names}, "nodes": nodes}


def _rule_lines(group: Sequence[GraphFinding]) -> Iterator[str]:
    rule, graphs = group[0].finding.rule, Counter(each.graph for each in group)
    yield f"{rule.severity}  {rule.id}  {len(group)} nodes in {len(graphs)} graphs"
    rows = {"what": rule.what, "remedy": rule.remedy, "source": rule.source, "CANN": rule.cann}
    for name, text in rows.items():
        yield from _wrapped(text, f"  {name:7}", " " * 9)
    for graph, count in graphs.items():
        own = [each.finding for each in group if each.graph == graph][:NAMED]
        more = f"; and {count - NAMED} more (--json names them)" if count > NAMED else ""
        text = "; ".join(f"{_named(finding)}: {finding.observed}" for finding in own) + more
        yield from _wrapped(f"{graph}: {text}", "  ", "    ")


def _named(finding: card_rules.Finding) -> str:
    """torchair names a node after its type."""
    return finding.node if finding.node.startswith(finding.type) else f"{finding.type} {finding.node}"


def _wrapped(text: str, first: str, later: str) -> list[str]:
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(text)
