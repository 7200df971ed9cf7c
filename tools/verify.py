"""`staticvl verify`."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from ..runtime.artifact import open_artifact, verify


def run(args: argparse.Namespace) -> int:
    total = sum(spec.nbytes for spec in open_artifact(args.artifact).manifest.files.values())
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        artifact = verify(args.artifact, bar.update)
    graphs = artifact.manifest.graphs
    worst = max((graph.certificate.worst for graph in graphs if graph.certificate), default=0.0)
    print(f"{args.artifact}: {len(artifact.manifest.files)} files, {total / 1e6:.1f} MB, every digest matches")
    print(f"{len(graphs)} graphs were certified when they were compiled, worst error {worst:.1e}")
    return 0
