"""Requests of every kind at once on compiled tiny models of every family: each answer is the one that the request gets alone.

Answers are compared by their logits, since kernels may round otherwise in batches of other sizes, and by their tokens up to the
first where two logits are as good as equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .checkpoints import tiny_llava
from .checkpoints_llava_next import tiny_llava_next
from .checkpoints_mllama import tiny_mllama
from .fakes import check_slots, noise
from .tiny_families import GOLDEN_QWEN

FAMILIES = ("llava", "llava_next", "mllama", "qwen_vl")
BUCKETS = Buckets(prefill=(4, 32), decode=(1, 4), context=224, slots=4)
TOLERANCE = 1e-4  # of the largest magnitude
TEXTS = ("Hello!", "What is in the picture?", "Where is the circle, and how large is it?", "Why?")
IMAGES = [noise(seed, size) for seed, size in enumerate([(30, 30), (41, 60)])]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compiled when first asked for."""
    return Artifacts(tmp_path_factory.mktemp("mixed"))


class Artifacts(dict[str, Path]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        makers = {"llava": tiny_llava, "llava_next": tiny_llava_next, "mllama": tiny_mllama}
        checkpoint = makers[name](self.folder / name).folder if name in makers else GOLDEN_QWEN
        buckets = BUCKETS.merged(Buckets(images=(1, 2))) if name == "mllama" else BUCKETS
        self[name] = self.folder / f"{name} artifact"
        build(Options(checkpoint=checkpoint, out=self[name], buckets=buckets))
        return self[name]


def draw(rng: np.random.Generator) -> tuple[str, list[Any], dict[str, Any]]:
    """A prompt, its images and its settings."""
    images = [IMAGES[i] for i in rng.integers(0, 2, rng.choice([0, 1, 1]))]
    settings: dict[str, Any] = {
        "max_new_tokens": int(rng.integers(1, 9)),
        "ignore_eos": bool(rng.random() < 0.7),
        "temperature": 0.0,
    }
    if rng.random() < 0.4:
        settings |= {"temperature": 1.2, "seed": int(rng.integers(9)), "top_p": 0.9, "min_p": 0.01}
    if rng.random() < 0.3:
        settings |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {7: 1.0}, "min_new_tokens": 1}
    return str(rng.choice(TEXTS)), images, settings


def check_alike(got: runtime.Output, alone: runtime.Output) -> bool:
    """Whether all tokens are the same; logits must agree as long as they are."""
    assert got.logits is not None and alone.logits is not None
    for place, (ours, theirs) in enumerate(zip(got.logits, alone.logits, strict=False)):
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()
        if got.token_ids[place] != alone.token_ids[place]:
            return False
    assert (got.token_ids, got.text, got.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
    return True


def check_traffic(artifact: Path, count: int, seed: int) -> None:
    model = runtime.load(artifact, threads=1, prefill_budget=8)
    fresh = runtime.load(artifact, threads=1, reuse=False)
    rng = np.random.default_rng(seed)
    requests = [draw(rng) for _ in range(count)]
    alone = [fresh.generate(text, images, return_logits=True, **settings) for text, images, settings in requests]
    waiting = list(range(count))
    alive: dict[int, runtime.model.Sequence] = {}
    same = dropped = 0
    while waiting or alive:
        while waiting and rng.random() < 0.3:
            place = waiting.pop(0)
            text, images, settings = requests[place]
            params = runtime.SamplingParams(**settings)
            alive[place] = model.new_sequence(model.processor.prompt(text, images), params, return_logits=True)
            model.start(alive[place])
        if alive and rng.random() < 0.01:
            model.end(alive.pop(int(rng.choice(list(alive)))))
            dropped += 1
        if not model.engine.scheduler.idle:
            model.advance()
        check_slots(model.engine)
        for place, sequence in list(alive.items()):
            if sequence.finish_reason:
                same += check_alike(model.output(sequence), alone[place])
                model.end(alive.pop(place))
    assert same >= 0.95 * (count - dropped) and dropped < count / 2
    assert model.engine.cache.free == BUCKETS.slots
    assert model.engine.metrics.reused_tokens > 0 and model.engine.metrics.reused_tiles > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_some_requests_of_every_kind(artifacts: dict[str, Path], family: str) -> None:
    check_traffic(artifacts[family], 30, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_requests_of_every_kind(artifacts: dict[str, Path], family: str) -> None:
    check_traffic(artifacts[family], 200, seed=2)
