"""Real graphs that verify drafts, of every family: the tokens and logits of ordinary greedy decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import open_artifact
from staticvl.runtime.engine.request import Output

from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED, REPO
from .fakes import Guess, noise
from .tiny_families import GOLDEN_QWEN

TOLERANCE = 1e-4  # of the largest magnitude
LENGTH = 24
FAMILIES = ("llava", "llava_next", "mllama", "qwen_vl")
CASES = [
    *(pytest.param(family, "onnx", marks=[] if family in ("llava", "qwen_vl") else [pytest.mark.slow]) for family in FAMILIES),
    *(pytest.param(family, "ascend", marks=pytest.mark.slow) for family in FAMILIES),
]


def checkpoint(family: str, folder: Path) -> Path:
    found = {"llava": EMBEDDED, "llava_next": REPO / "tools" / "assets" / "tiny_llava16", "qwen_vl": GOLDEN_QWEN}
    return found[family] if family in found else tiny_mllama(folder).folder


def answer(model: runtime.Model, text: str, image: Image.Image, truth: list[int] | None) -> tuple[Output, int]:
    """Greedy, and how many runs the answer took after its prompt; with `truth`, drafts come from it, right ones and wrong."""
    params = runtime.SamplingParams(max_new_tokens=LENGTH, temperature=0.0, ignore_eos=True, logprobs=1)
    sequence = model.new_sequence(model.processor.prompt(text, [image]), params, return_logits=True)
    if truth is not None:
        sequence.prompt_lookup = Guess(truth, np.random.default_rng(0))  # type: ignore[assignment]
    runs = dict(model.engine.metrics.runs)
    [out] = model.run([sequence])
    return out, sum(model.engine.metrics.runs[kind] - runs[kind] for kind in ("decode", "verify"))


def check_the_same(model: runtime.Model) -> None:
    """An answer of which every token is drafted now and then, some wrongly, is the answer without drafts."""
    for text in ("Hello!", "What is in the picture?"):
        plain, steps = answer(model, text, noise(3), None)
        drafted, fewer = answer(model, text, noise(3), plain.token_ids)
        assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)
        assert plain.logits is not None and drafted.logits is not None
        assert np.abs(drafted.logits - plain.logits).max() <= TOLERANCE * np.abs(plain.logits).max()
        assert steps == LENGTH - 1 > fewer
    metrics = model.engine.metrics
    assert 0 < metrics.accepted < metrics.drafted


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_every_family_verifies_drafts(family: str, backend: str, tmp_path: Path) -> None:
    images: dict[str, Any] = {"images": (1,)} if family == "mllama" else {}
    buckets = Buckets(prefill=(64,), decode=(1,), verify=(4,), context=384, slots=1, **images)
    out = tmp_path / "artifact"
    build(Options(checkpoint=checkpoint(family, tmp_path / "checkpoint"), out=out, buckets=buckets, backend=backend))
    verify = [graph for graph in open_artifact(out).manifest.graphs if graph.kind == "verify"]
    assert {graph.images for graph in verify} == ({0, 1} if images else {0})
    assert all(graph.certificate and graph.certificate.passed and len(graph.certificate.cases) > 3 for graph in verify)
    with runtime.load(out, device="sim:float32" if backend == "ascend" else "cpu", reuse=False) as model:
        check_the_same(model)
