"""`staticvl show`: what an artifact holds, as tables."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from ..runtime.artifact import Certificate, Manifest, open_artifact


def run(args: argparse.Namespace) -> int:
    manifest = open_artifact(args.artifact).manifest
    console = Console(highlight=False)
    console.print(_facts(manifest))
    console.print(_graphs(manifest))
    return 0


def _facts(manifest: Manifest) -> Table:
    model, cache = manifest.model, manifest.cache
    weights = sum(weight.nbytes for weight in manifest.weights.values())
    rows = {
        "model": f"{model.family} ({model.layout} layout), hidden {model.hidden_size}, vocabulary {model.vocab_size}",
        "picture": f"{model.image.size} x {model.image.size}, {model.image.mode}, {model.image.rows} tokens",
        "backend": f"{manifest.backend}, quantisation {manifest.quant}, tensor parallel {manifest.tp}",
        "weights": f"{len(manifest.weights)} tensors, {weights / 1e6:.1f} MB",
        "cache": f"{cache.slots} slots of {cache.context} tokens, {cache.layers} layers, {cache.kv_heads} kv heads of "
        f"{cache.head_dim}, {cache.dtype}, {cache.nbytes / 1e6:.1f} MB",
        "made by": f"staticvl {manifest.build.staticvl}, torch {manifest.build.torch}, schema {manifest.schema_version}",
        "digest": manifest.digest[:16],
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _graphs(manifest: Manifest) -> Table:
    table = Table(title="graphs")
    for column in ("kind", "bucket", "ms when compiled", "checks", "worst error", "allowed", "rounding"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for graph in sorted(manifest.graphs, key=lambda g: (g.kind, g.bucket)):
        table.add_row(graph.kind, str(graph.bucket), f"{graph.cost_ms:.2f}", *_checks(graph.certificate))
    return table


def _checks(certificate: Certificate | None) -> tuple[str, str, str, str]:
    if certificate is None:
        return "-", "-", "-", "-"
    rounding = "-" if certificate.rounding is None else f"{certificate.rounding:.1e}"
    return str(len(certificate.cases)), f"{certificate.worst:.1e}", f"{certificate.tolerance:.0e}", rounding
