"""Fixtures shared by the suite: artifacts are compiled once per session, and one thread is best for models this small."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

gc.disable()  # until test files are collected: imports make many objects and little garbage

# A busy machine is no failure.
hypothesis_settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("patient")

REPO = Path(__file__).parent.parent
EMBEDDED = REPO / "tools" / "assets" / "tiny_llava15"
PUBLISHED = REPO.parent / "shared" / "published"
# Files of more than 15 core-seconds, which start first: one of them at the end would leave a core idle.
LONGEST = tuple(
    "many_requests ascend_tp ge_cost ascend compare_faults host_cache rank_faults ascend_fusions howto examples source_files "
    "kernels ranks mixed_traffic instruction_sets".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, as LONGEST orders them, then the others as they were."""
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """Leave what the imports made, half a million objects, out of every later collection of garbage, and collect less often:
    traces and conversions make many objects that live."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


SMALL_BUCKETS = Buckets(prefill=(8, 32), decode=(1, 2, 4), vision=(1, 2), context=512, slots=4)


@pytest.fixture(scope="session")
def embedded_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model, compiled."""
    out = tmp_path_factory.mktemp("embedded") / "artifact"
    build(Options(checkpoint=EMBEDDED, out=out, buckets=SMALL_BUCKETS))
    return out


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained tiny model, cut in two; with candidates, unlike the whole one."""
    out = tmp_path_factory.mktemp("two") / "artifact"
    buckets = Buckets(prefill=(32,), decode=(1, 4), vision=(1,), verify=(4,), context=512, slots=4)
    build(Options(checkpoint=EMBEDDED, out=out, tp=2, buckets=buckets, candidates=6))
    return out
