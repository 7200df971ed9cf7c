"""Artifacts for timing: compiled as by `staticvl compile`, without the checks, which take most of a build.

Comparing answers with the peers' (answers.py) replaces the checks. Costs, by which the scheduler splits prompts, are assumed to
grow with a graph's size.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from staticvl.compiler.build import build
from staticvl.compiler.check import Certifier
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import Certificate, GraphSpec


def _unchecked(_: Certifier, graph: GraphSpec, *__: object) -> tuple[Certificate, float]:
    return Certificate(reference="none: made for timing", tolerance=0.0, cases=()), 10.0 + graph.bucket


def build_for_timing(checkpoint: Path, out: Path, quant: str, buckets: Buckets, dtype: str = "", *, tune: bool = False) -> None:
    """Compile `checkpoint` into `out`; what is there already is used again. `tune`: with this machine's fastest kernels."""
    with mock.patch.object(Certifier, "certify", _unchecked):
        build(Options(checkpoint=checkpoint, out=out, quant=quant, buckets=buckets, dtype=dtype, tune=tune))
