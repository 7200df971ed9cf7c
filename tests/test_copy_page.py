"""A page copied in all layers: on each backend, on all ranks in lockstep, and from rank 0 to a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from staticvl.compiler.eager import EagerBackend
from staticvl.compiler.lockstep import LockstepBackend
from staticvl.runtime.artifact import CacheSpec
from staticvl.runtime.backends.base import Backend
from staticvl.runtime.backends.distributed.leader import LeaderBackend
from staticvl.runtime.backends.distributed.protocol import CopyPage, FrameKind, Header, read_header
from staticvl.runtime.backends.distributed.rank_worker import RankWorker

from .need_torchair import skip_without_torchair

CACHE = CacheSpec(layers=2, kv_heads=2, head_dim=16, slots=2, context=200, rows=208, dtype="float16", pages=5)


def eager(cache: CacheSpec = CACHE) -> Backend:
    return EagerBackend(Path(), {}, cache, lambda key: None)  # type: ignore[arg-type, return-value]


def ascend() -> Backend:
    skip_without_torchair()
    from staticvl.runtime.backends.ascend.backend import AscendBackend, simulated

    return AscendBackend(Path(), CACHE, {}, {}, simulated(wide=True))


def two_ranks() -> Backend:
    """Each with one of the heads."""
    return LockstepBackend(2, lambda group: eager(msgspec.structs.replace(CACHE, kv_heads=1)), paged=True)


@pytest.mark.parametrize("make", [eager, ascend, two_ranks])
def test_a_page_is_copied_in_all_layers(make: Any) -> None:
    backend, rng = make(), np.random.default_rng(0)
    before = {name: rng.standard_normal(shape, np.float32) for name, shape in CACHE.buffers().items()}
    for name, value in before.items():
        backend.write_cache(name, value)
        assert np.array_equal(backend.read_cache(name, 3), value[:3])
    backend.copy_page(3, 1)
    for name, value in before.items():
        value[1] = value[3]
        assert np.array_equal(backend.read_cache(name, 5), value)


class Recorder:
    """A backend that notes what it copies."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, int]] = []

    def copy_page(self, source: int, target: int) -> None:
        self.copies.append((source, target))


def test_rank_0_tells_the_others_and_a_worker_does_it() -> None:
    sent: list[bytes] = []

    def send(workers: Sequence[int], header: Header, views: Sequence[memoryview]) -> None:
        assert list(workers) == [1, 2]
        sent.append(header.packed() + b"".join(views))

    monitor = SimpleNamespace(send=send, run_watched=lambda work: work(), links={1: None, 2: None}, close=lambda: None)
    manifest: Any = SimpleNamespace(graphs=(), pp=1, tp=3, ranks=3, of_stage=lambda stage: SimpleNamespace(graphs=()))
    first, other = Recorder(), Recorder()
    leader = LeaderBackend(first, monitor, manifest)  # type: ignore[arg-type]
    leader.copy_page(4, 2)
    (frame,) = sent
    header = read_header(frame[:32])
    assert header.kind is FrameKind.COPY_PAGE and first.copies == [(4, 2)]

    def receive_payload(given: Header, payload: Any) -> Any:
        assert given is header and payload is CopyPage
        return msgspec.json.decode(frame[32:], type=payload)

    link: Any = SimpleNamespace(receive_payload=receive_payload)
    worker = RankWorker(1, None, link, (None,), 1.0)  # type: ignore[arg-type]
    worker.backend = other  # type: ignore[assignment]
    worker._start_call(header)
    worker._wait_for_call()
    worker.compute_thread.close(1)
    assert other.copies == [(4, 2)] and not worker.error
