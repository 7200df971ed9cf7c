"""Random requests over few pages: every answer is the one that the request gets alone, and after every step the pages hold what
the host says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.engine import blocks
from staticvl.runtime.engine.engine import GraphRun
from staticvl.runtime.engine.paged_cache import PagedCache
from staticvl.runtime.engine.request import Sequence
from staticvl.runtime.engine.scheduler import Step
from staticvl.runtime.manifest import cache as cache_records
from staticvl.runtime.processor.prompt import Message

from .conftest import EMBEDDED
from .fake_backend import IMAGE_NUMBERS, FakeBackend
from .fakes import fake_model
from .test_many_requests import CONTEXT, BenchRequest, Traffic, Watched, one_at_a_time

PAGE = 4
PAGES = 1 + CONTEXT // PAGE  # one of the largest requests, or a few others


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", PAGE)
    monkeypatch.setattr(cache_records, "PAGE_TOKENS", PAGE)


class WatchedPages(Watched):
    """What no sequence may read is spoilt, and what a run writes belongs to its sequence alone."""

    def __init__(self, model: runtime.Model, rng: np.random.Generator) -> None:
        super().__init__(model, rng)
        assert isinstance(self.engine.cache, PagedCache) and isinstance(self.engine.backend, FakeBackend)
        self.cache, self.fake = self.engine.cache, self.engine.backend
        self.shared = 0  # the most holders that a page had
        self.engine.on_run = self.check_run
        self.engine.clock = lambda: float(self.steps)

    def checked_step(self) -> Step:
        step = super().checked_step()
        pages = self.cache.blocks
        self.fake.spoil([page for page in range(1, pages.budget + 1) if page not in pages.filled])
        self.shared = max(self.shared, *pages.holders.values(), 0, 0)
        return step

    def check_run(self, run: GraphRun) -> None:
        assert run.slot == 0
        if run.step.kind == "vision":
            return
        slots = run.step.slots
        assert run.feed["lengths"][: len(slots)].tolist() == self.cache.lengths[slots].tolist()
        written = set((run.feed["slot_mapping"] // PAGE).ravel().tolist()) - {0}
        assert all(self.cache.blocks.alone(page) for page in written)
        if run.step.kind == "decode":
            buckets = [key.bucket for key in self.engine.scheduler.decode[0]]
            assert run.step.bucket == min(bucket for bucket in buckets if bucket >= len(slots))

    def check_ledger(self, slot: int) -> None:
        cache, length = self.cache, int(self.cache.lengths[slot])
        keys = cache.blocks.contents(cache.pages_of(slot), length)
        values = keys[:, 0].copy()
        shown = np.flatnonzero(values < 0)
        sums = np.array([self.sums[keys[row, 2:].tobytes()] for row in shown], np.int64)
        values[shown] = (sums - 1 - values[shown]) % IMAGE_NUMBERS
        kept = self.fake.kept[cache.pages_of(slot)].reshape(-1)[:length]
        assert np.array_equal(kept, (values + 1) * (np.arange(length) + 1))


class PagedTraffic(Traffic):
    """With several answers to one prompt, and answers whose time is limited."""

    late = 0  # answers that a deadline has ended

    def request(self) -> BenchRequest:
        if self.rng.random() < 0.6:
            return super().request()
        text, images = self.words()
        chosen = self.settings() | ({"deadline_s": float(self.rng.integers(5, 60))} if self.rng.random() < 0.5 else {})
        params = runtime.SamplingParams(**chosen, n=int(self.rng.integers(1, 4)))
        message = Message("user", text, len(images))
        prompt = self.model.processor.prompt([message], images)
        entries = [self.answer(prompt, params, index) for index in range(params.n)]
        self.open += entries[1:]
        return entries[0]

    def answer(self, prompt: Any, params: runtime.SamplingParams, index: int) -> BenchRequest:
        wanted = self.alone.run([self.alone.new_sequence(prompt, params, index=index)])[0]
        entry = BenchRequest(wanted, sequence=self.model.new_sequence(prompt, params, index=index))
        assert entry.sequence is not None
        self.guess(entry.sequence, wanted.token_ids)
        entry.drop_after = int(self.rng.integers(0, 5)) if self.rng.random() < 0.3 else None
        self.model.start(entry.sequence)
        return entry

    def advance_request(self, entry: BenchRequest, sequence: Sequence) -> None:
        if sequence.finish_reason == "deadline":
            assert sequence.generated == entry.wanted.token_ids[: len(sequence.generated)]
            self.late += 1
            self.model.end(sequence)
            self.open.remove(entry)
        else:
            super().advance_request(entry, sequence)


def run_traffic(
    factory: pytest.TempPathFactory, seed: int, count: int, *, reuse: bool = True, speculate: int = 0, pages: int = PAGES
) -> tuple[WatchedPages, PagedTraffic]:
    slots = 5 + seed % 3
    buckets = Buckets(prefill=(4, 16, 64), decode=(1, 2, slots), vision=(1, 2), verify=(3, 6), context=CONTEXT, slots=slots)
    budget = (None, 8)[seed % 2]
    model = fake_model(
        EMBEDDED, factory.mktemp("paged"), buckets, reuse=reuse, speculate=speculate, prefill_budget=budget, pages=pages
    )
    watched = WatchedPages(model, np.random.default_rng(seed))
    traffic = PagedTraffic(watched, one_at_a_time(factory), np.random.default_rng(seed), most=40)
    traffic.run(count)
    assert watched.cache.blocks.used == 0 and watched.cache.free == slots
    return watched, traffic


def check_what_happened(watched: WatchedPages, traffic: PagedTraffic, *, reuse: bool, speculate: int) -> None:
    metrics = watched.engine.metrics
    assert traffic.ended["whole"] > 20 and traffic.ended["turns"] > 1 and traffic.late > 1
    assert metrics.preemptions > 5 and metrics.finished["cancelled"] > 0
    assert (metrics.evicted_blocks > 0) == (metrics.reused_tokens > 0) == (metrics.copies > 0) == (watched.shared > 1) == reuse
    assert (metrics.accepted > 20) == (speculate > 0)


@pytest.mark.parametrize(("seed", "reuse", "speculate"), [(1, True, 5), (2, False, 0)])
def test_requests_in_few_pages(tmp_path_factory: pytest.TempPathFactory, seed: int, reuse: bool, speculate: int) -> None:
    watched, traffic = run_traffic(tmp_path_factory, seed, 60, reuse=reuse, speculate=speculate)
    check_what_happened(watched, traffic, reuse=reuse, speculate=speculate)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_thousand_requests_in_few_pages(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    reuse, speculate = seed % 5 != 0, (0, 5)[seed % 3 == 0]
    watched, traffic = run_traffic(tmp_path_factory, seed, 100, reuse=reuse, speculate=speculate)
    check_what_happened(watched, traffic, reuse=reuse, speculate=speculate)


def test_pages_for_all(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing waits for pages, and nothing is preempted but at random."""
    watched, traffic = run_traffic(tmp_path_factory, 4, 25, pages=1 + 7 * CONTEXT // PAGE)
    assert not watched.cache.bounded and traffic.ended["whole"] > 5
