"""`staticvl verify`."""

from __future__ import annotations

import argparse
import contextlib
import sys

from tqdm import tqdm

from ..compiler.leftovers import remove_waiting
from ..runtime.artifact import open_artifact, read_manifest, verify
from ..runtime.signature import check_signature


def run(args: argparse.Namespace) -> int:
    if args.key is not None:
        check_signature(args.artifact, read_manifest(args.artifact), args.key)
    opened = open_artifact(args.artifact)
    opened.close()
    total = sum(spec.nbytes for spec in opened.manifest.files.values())
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:
        artifact = verify(args.artifact, bar.update)
    if args.key is not None:
        check_signature(args.artifact, artifact.manifest, args.key)  # again: the artifact may have been replaced meanwhile
    artifact.close()
    graphs = artifact.manifest.graphs
    worst = max((graph.certificate.worst for graph in graphs if graph.certificate), default=0.0)
    print(f"{args.artifact}: {len(artifact.manifest.files)} files, {total / 1e6:.1f} MB, every digest matches")
    if args.key is not None:
        print(f"signed with the key that belongs to {args.key}")
    print(f"{len(graphs)} graphs were certified when they were compiled, worst error {worst:.1e}")
    _tidy(args)
    return 0


def _tidy(args: argparse.Namespace) -> None:
    """Remove damaged files that this machine keeps beside the artifact, and files of earlier artifacts."""
    from ..runtime.backends.host_cache import remove_damaged

    for message in remove_damaged(args.artifact):
        print(message)
    with contextlib.suppress(OSError):  # a folder that cannot be written keeps what it has
        if count := remove_waiting(args.artifact):
            print(f"{count} files of an earlier artifact stay, because it is in use")
