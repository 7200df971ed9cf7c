"""Gigabytes as blocks of the cache."""

from __future__ import annotations

import msgspec
import pytest

from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.engine.block_budget import block_budget
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions

from .fake_backend import FakeBackend
from .fakes import fake_artifact

TOKEN = 2 * 4 * 4  # keys and values of one layer with one head of 4 in float32


def test_by_default_every_slot_may_be_full() -> None:
    budget = block_budget(fake_artifact(slots=3, context=300).manifest, None)
    assert (budget.blocks, budget.block_bytes, budget.bounded) == (9, 128 * TOKEN, False)


def test_gigabytes_are_whole_blocks() -> None:
    manifest = fake_artifact(slots=3, context=300).manifest
    budget = block_budget(manifest, 5.9 * 128 * TOKEN / 1e9)
    assert (budget.blocks, budget.tokens, budget.bounded) == (5, 640, True)
    assert budget.gigabytes == pytest.approx(5 * 128 * TOKEN / 1e9)


def test_keys_of_images_are_taken_off_first() -> None:
    """Two cross layers, 12 keys of one image, in every one of two slots."""
    manifest = fake_artifact(slots=2, context=60, images=(1,)).manifest
    images = 2 * 2 * 12 * TOKEN
    assert block_budget(manifest, (images + 3.5 * 128 * TOKEN) / 1e9).blocks == 3
    with pytest.raises(ArtifactError, match=r"and the keys of images 0\.00154 MB"):
        block_budget(manifest, (images + 100) / 1e9)


@pytest.mark.parametrize("cache_gb", [0.0, -1.0, float("nan"), float("inf"), 4000 / 1e9])
def test_too_little_is_refused_with_the_least(cache_gb: float) -> None:
    with pytest.raises(
        ArtifactError, match=r"cache_gb is .*; expected at least 4.1e-06: a block of 128 tokens takes 0.0041 MB"
    ):
        block_budget(fake_artifact().manifest, cache_gb)


def test_a_cache_on_ascend_is_reserved_as_a_whole() -> None:
    manifest = msgspec.structs.replace(fake_artifact().manifest, backend="ascend")
    assert block_budget(manifest, None).blocks == 4
    with pytest.raises(ArtifactError, match="an artifact for ascend reserves its whole cache when it is loaded"):
        block_budget(manifest, 1.0)


def test_the_capacity_of_a_sequence() -> None:
    manifest = fake_artifact(slots=3, context=300).manifest
    backend = FakeBackend(manifest)
    assert Engine(manifest, backend).capacity == 300
    assert Engine(manifest, backend, EngineOptions(cache_gb=2.5 * 128 * TOKEN / 1e9)).capacity == 256
