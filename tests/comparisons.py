"""What tests of the comparison share: small artifacts of every family, and a quick comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import read_manifest
from staticvl.tools.comparing.compare import Comparison
from staticvl.tools.comparing.open_side import open_side
from staticvl.tools.comparing.result import ComparisonResult
from staticvl.tools.comparing.samples import Sample, built_in_samples
from staticvl.tools.comparing.sides import Side
from staticvl.tools.comparing.thresholds import read_thresholds

from .ascend import CHECKPOINTS

BUCKETS = {
    "llava": Buckets(prefill=(8, 32), decode=(1, 2), vision=(1,), context=160, slots=2),
    "llava_next": Buckets(prefill=(64,), decode=(1,), vision=(5,), context=400, slots=1),
    "mllama": Buckets(prefill=(16,), decode=(1,), images=(1,), context=96, slots=1),
    "qwen_vl": Buckets(prefill=(32,), decode=(1,), vision=(1,), context=112, slots=1),
}
SAMPLES = {
    "llava": ("text 2", "image, wide"),
    "llava_next": ("image, tall",),
    "mllama": ("text 2", "image, large"),
    "qwen_vl": ("text 1", "image, wide"),
}


def compiled(family: str, out: Path, **options: Any) -> Path:
    build(Options(checkpoint=CHECKPOINTS[family], out=out, buckets=BUCKETS[family], **options))
    return out


def reference_of(family: str, artifact: Path, by: str = "eager") -> Side:
    return open_side(CHECKPOINTS[family], by=by, like=artifact)


def samples_of(family: str) -> list[Sample]:
    return [sample for sample in built_in_samples() if sample.name in SAMPLES[family]]


def compared(reference: Side, candidate: Path | Side, samples: Sequence[Sample], **settings: Any) -> ComparisonResult:
    side = candidate if not isinstance(candidate, Path) else open_side(candidate, threads=1)
    settings = {"new_tokens": 4, "limits": read_thresholds(None), **settings}
    return Comparison(reference=reference, candidate=side, samples=samples, **settings).run()


def check_healthy(reference: Side, artifact: Path, family: str, layers: float | None = None) -> None:
    """No alarm, with every graph run at its edges and every operator looked at. `layers`: the error that a layer may have
    relative to its output, by default the limit of logits."""
    result = compared(reference, artifact, samples_of(family), inspect="always")
    assert result.passed, (result.broken, result.findings)
    assert {edge.graph for edge in result.edges} == {graph.name for graph in read_manifest(artifact).graphs}
    assert 0 < max(own for own, _ in result.layers.values()) < result.limits.operators and not result.scope
    worst = [max(each.layers) for each in result.samples]
    assert all(0 < each < (layers or result.limits.relative) for each in worst), worst
