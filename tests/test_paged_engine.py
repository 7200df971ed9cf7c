"""The engine over a cache of pages, one behaviour at a time; over random traffic it is tested in test_paged_requests.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from staticvl.runtime.artifact import ArtifactError, CacheSpec, Manifest, RopeParameters
from staticvl.runtime.engine import blocks
from staticvl.runtime.engine.block_budget import block_budget
from staticvl.runtime.engine.conversation import Conversation
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.engine.paged_cache import PagedCache
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.manifest import cache as cache_records
from staticvl.runtime.processor.prompt import Prompt
from staticvl.runtime.soundness import faults

from .fake_backend import FakeBackend
from .fakes import (
    check_blocks,
    check_slots,
    fake_artifact,
    fake_engine,
    image,
    image_prompt,
    oracle,
    text_prompt,
)

PAGE = 4
TEN = text_prompt(*range(10, 20))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", PAGE)
    monkeypatch.setattr(cache_records, "PAGE_TOKENS", PAGE)


def engine_of(pages: int = 40, *, reuse: bool = True, **sizes: Any) -> Engine:
    return fake_engine(pages=pages, reuse=reuse, **sizes)


def cache_of(engine: Engine) -> PagedCache:
    assert isinstance(engine.cache, PagedCache)
    return engine.cache


def params(tokens: int = 12, **settings: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=tokens, ignore_eos=True, **{"temperature": 0.0, **settings})


def run(engine: Engine, steps: int = 500) -> None:
    """So many steps at most, with all that must hold after each."""
    while not engine.scheduler.idle and steps:
        engine.step()
        check_slots(engine)
        check_blocks(engine)
        steps -= 1
    assert steps or not engine.scheduler.idle


def turn(engine: Engine, conversation: Conversation, prompt: Prompt, tokens: int = 3) -> Sequence:
    sequence = engine.new_sequence(prompt, params(tokens))
    engine.resume(sequence, conversation)
    engine.add(sequence)
    run(engine)
    assert sequence.generated == oracle(prompt, sequence.params)
    return sequence


# --- Feeds -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_decode_step_are_dense_and_padding_is_in_page_0() -> None:
    engine = engine_of(slots=4, decode={1: 1.0, 3: 1.0, 4: 1.0}, candidates=3)
    sequences = [engine.add_request(text_prompt(*range(5, 5 + n)), params(tokens)) for n, tokens in ((6, 2), (9, 9), (3, 9))]
    while sequences[0].finish_reason is None:
        engine.step()
    seen: list[Any] = []
    engine.on_run = seen.append
    engine.step()
    (graph_run,) = seen
    feed, step = graph_run.feed, graph_run.step
    assert (step.bucket, step.count, graph_run.slot) == (3, 2, 0)
    assert step.slots == [1, 2], "slot 0 is free, and takes no row"
    assert feed["token_ids"][:, 0].tolist() == [sequences[1].generated[-2], sequences[2].generated[-2], 0]
    assert feed["lengths"].tolist() == [10, 4, 0]
    pages = [cache_of(engine).pages_of(slot) for slot in step.slots]
    width = cache_of(engine).spec.table_width
    assert feed["block_table"].tolist() == [own + [0] * (width - len(own)) for own in (*pages, [])]
    assert feed["slot_mapping"][:, 0].tolist() == [pages[0][2] * PAGE + 2, pages[1][1] * PAGE, 2]
    run(engine)
    assert [each.generated for each in sequences] == [oracle(each.prompt, each.params) for each in sequences]


def test_a_chunk_is_padded_into_all_places_of_page_0() -> None:
    engine = engine_of(prefill={16: 1.0})
    engine.add_request(text_prompt(*range(5, 11)), params(1))
    seen: list[Any] = []
    engine.on_run = seen.append
    engine.step()
    feed = seen[0].feed
    first, second = feed["block_table"][0, :2].tolist()
    own = [first * PAGE + place for place in range(PAGE)] + [second * PAGE, second * PAGE + 1]
    assert feed["slot_mapping"][0].tolist() == own + [place % PAGE for place in range(6, 16)]


def test_dynamic_ntk_in_a_row_that_is_no_slot() -> None:
    engine = engine_of(slots=3, rope=RopeParameters(theta=1e8, ntk_positions=8))
    short = engine.add_request(text_prompt(4, 5), params(1))
    plain = engine.add_request(text_prompt(6, 7, 8), params(20))
    long = engine.add_request(replace(TEN, ntk=3.0, state=np.full(10, 3, np.int32)), params(20))
    run(engine)
    assert [each.generated for each in (short, plain, long)] == [
        oracle(each.prompt, each.params) for each in (short, plain, long)
    ]


# --- Sharing -----------------------------------------------------------------------------------------------------------


def test_a_prefix_of_thirty_requests_is_there_once() -> None:
    """Forty tokens take ten pages, and each request one of its own; without sharing, two would fit."""
    engine = engine_of(pages=10 + 30 + 1, slots=30, prefill={4: 1.0, 64: 2.0}, decode={30: 1.0})
    prompts = [text_prompt(*range(40), 50 + n) for n in range(30)]
    sequences = [engine.add_request(prompt, params(3)) for prompt in prompts]
    while any(each.times.first_token == 0 for each in sequences):
        engine.step()
        check_blocks(engine)
    assert engine.metrics.runs["prefill"] == 30 and engine.scheduler.preemptions == 0
    assert cache_of(engine).blocks.used <= 40
    run(engine)
    assert [each.reused for each in sequences] == [0] + [40] * 29
    assert [each.generated for each in sequences] == [oracle(prompt, params(3)) for prompt in prompts]


def test_several_answers_to_a_prompt_share_full_pages_and_copy_the_last() -> None:
    engine = engine_of(prefill={2: 1.0})
    settings = params(8, n=3, temperature=1.0, seed=5)
    sequences = [engine.new_sequence(TEN, settings, index=index) for index in range(3)]
    for each in sequences:
        engine.add(each)
    copies: list[tuple[int, int]] = []
    backend = engine.backend
    assert isinstance(backend, FakeBackend)
    original = backend.copy_page
    backend.copy_page = lambda *pages: (copies.append(pages), original(*pages))  # type: ignore[method-assign]
    while any(each.times.first_token == 0 for each in sequences):
        engine.step()
    tables = [cache_of(engine).pages_of(each.held_slot) for each in sequences]
    assert {tuple(table[:2]) for table in tables} == {tuple(tables[0][:2])} and len({table[2] for table in tables}) == 3
    assert copies == [] and [each.reused for each in sequences] == [0, 8, 8], "one token is left with a copy and without it"
    run(engine)
    longer = text_prompt(*range(10, 20), 1)
    more = [engine.add_request(longer, params(4)) for _ in range(2)]
    run(engine)
    assert len(copies) == engine.metrics.copies == 2 and [each.reused for each in more] == [10, 10]
    assert all(each.generated == oracle(longer, params(4)) for each in more)


def test_images_of_one_place_and_two_contents_are_two_prefixes() -> None:
    engine = engine_of(prefill={4: 1.0})
    prompts = [image_prompt(5, image(number), 6, image(40), 7, 8, 9) for number in (31, 31, 32)]
    sequences = [engine.add_request(prompt, params(4)) for prompt in prompts]
    run(engine)
    assert [each.reused for each in sequences] == [0, 8, 1 if engine.metrics.copies > 1 else 0]
    assert [each.generated for each in sequences] == [oracle(prompt, params(4)) for prompt in prompts]


def test_without_reuse_nothing_is_shared() -> None:
    engine = engine_of(reuse=False)
    sequences = [engine.add_request(TEN, params(4)) for _ in range(3)]
    run(engine)
    assert [each.reused for each in sequences] == [0, 0, 0]
    assert cache_of(engine).blocks.cached == engine.metrics.copies == 0


# --- Chats -------------------------------------------------------------------------------------------------------------


def test_the_next_turn_goes_on_in_the_last_page_of_the_turn_before() -> None:
    engine, conversation = engine_of(prefill={2: 1.0}), Conversation()
    first = turn(engine, conversation, TEN)
    assert engine.slot_of(conversation) is None and cache_of(engine).free == cache_of(engine).spec.slots
    assert cache_of(engine).blocks.used == 0 and cache_of(engine).blocks.cached == 3
    said = [*range(10, 20), *first.generated]
    second = turn(engine, conversation, text_prompt(*said, 3, 4))
    assert second.reused == 12 and engine.metrics.copies == 0
    rewound = turn(engine, conversation, text_prompt(*said[:11], 7, 8, 9, 10, 11))
    assert rewound.reused == 11 and engine.metrics.copies == 1, "the page goes on otherwise"
    engine.release(conversation)


def test_chats_between_turns_keep_no_request_out() -> None:
    engine = engine_of(pages=9, slots=2, prefill={4: 1.0, 16: 2.0})
    chats = [Conversation() for _ in range(5)]
    for place, chat in enumerate(chats):
        turn(engine, chat, text_prompt(*range(20 + place, 27 + place)))
    large = engine.add_request(text_prompt(*range(28)), params(5))
    run(engine)
    assert large.generated == oracle(large.prompt, large.params) and engine.metrics.evicted_blocks > 0


# --- Pages that run out ------------------------------------------------------------------------------------------------


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    """Nine pages: three prompts of 10 take three each, and the first that grows takes one of the last's."""
    engine = engine_of(pages=1 + 11, slots=3, prefill={16: 1.0}, reuse=False)
    old, middle, young, late = (engine.add_request(TEN, params()) for _ in range(4))
    while not engine.scheduler.preemptions:
        engine.step()
        check_blocks(engine)
    assert young.slot is None and engine.scheduler.waiting == [young, late]
    run(engine)
    assert all(each.generated == oracle(TEN, params()) for each in (old, middle, young, late))
    assert old.preemptions == 0 and old.times.finished < young.times.finished < late.times.finished


def test_admission_counts_pages_that_others_hold_once() -> None:
    """Six pages of one prompt, and one each for three answers that grow: another such prompt fits, and no other."""
    engine = engine_of(pages=1 + 10, slots=4, prefill={32: 1.0}, decode={4: 1.0})
    long = text_prompt(*range(25))
    first = engine.add_request(long, params(8))
    run(engine, 2)
    same, other = engine.add_request(long, params(2)), engine.add_request(text_prompt(*range(30, 55)), params(2))
    engine.step()
    assert same.slot is not None and other.slot is None
    run(engine)
    assert [each.generated for each in (first, same, other)] == [
        oracle(each.prompt, each.params) for each in (first, same, other)
    ]


def test_what_can_never_fit_is_refused_with_the_figures() -> None:
    engine = engine_of(pages=7, slots=4, context=256)
    with pytest.raises(ContextError) as error:
        engine.add_request(TEN, params(16))
    assert str(error.value) == (
        "the prompt has 10 tokens and max_new_tokens is 16, which takes 7 pages of 4 tokens (8.96e-07 GB), but the artifact "
        "has 6 (7.68e-07 GB); give at most 15 new tokens, or compile one with more pages"
    )
    sequence = engine.add_request(TEN, params(15))
    run(engine)
    assert sequence.generated == oracle(TEN, params(15)) and engine.capacity == 24


def test_the_budget_is_the_pages_of_the_artifact() -> None:
    manifest = fake_artifact(slots=4, context=64, pages=33).manifest
    assert (block_budget(manifest, None).blocks, block_budget(manifest, None).bounded) == (32, True)
    assert not block_budget(fake_artifact(slots=4, context=64, pages=65).manifest, None).bounded
    with pytest.raises(ArtifactError) as error:
        block_budget(manifest, 1.0)
    assert str(error.value) == (
        "cache_gb is 1.0, but the artifact reserves its 32 pages of 4 tokens when it is loaded; leave it out, or compile for "
        "fewer pages"
    )


# --- Faults ------------------------------------------------------------------------------------------------------------


def test_a_copy_that_fails_ends_its_request_alone() -> None:
    engine = engine_of(prefill={2: 1.0})
    longer = text_prompt(*range(10, 20), 1)
    first, second = engine.add_request(longer, params(8)), engine.add_request(longer, params(8))

    def broken(source: int, target: int) -> None:
        raise OSError("no copy")

    engine.backend.copy_page = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no copy"):
        run(engine)
    assert second.finish_reason == "failed"
    run(engine)
    assert first.generated == oracle(longer, params(8)) and cache_of(engine).blocks.used == 0


def test_pages_that_a_failed_run_may_have_spoilt_are_not_shared() -> None:
    engine = engine_of(prefill={4: 1.0})
    original, count = engine.backend.run, [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise OSError("the device is gone")
        return original(*args)

    engine.backend.run = failing  # type: ignore[method-assign]
    broken = engine.add_request(TEN, params(6))
    with pytest.raises(OSError, match="gone"):
        run(engine)
    assert broken.finish_reason == "failed" and cache_of(engine).blocks.cached == 0
    again = engine.add_request(TEN, params(6))
    run(engine)
    assert again.reused == 0 and again.generated == oracle(TEN, params(6))


def test_a_reset_frees_all_pages() -> None:
    engine = engine_of()
    engine.add_request(TEN, params(6))
    run(engine, 3)
    engine.reset(RuntimeError("stop"))
    check_slots(engine)
    check_blocks(engine)
    assert cache_of(engine).blocks.free == cache_of(engine).blocks.budget


def with_cache(manifest: Manifest, **changes: Any) -> Manifest:
    spec: CacheSpec = msgspec.structs.replace(manifest.cache, **changes)
    return msgspec.structs.replace(manifest, cache=spec)


def test_manifests_that_contradict_themselves() -> None:
    paged = fake_artifact(pages=40).manifest
    sound = set(faults(paged))
    crossed = set(faults(with_cache(fake_artifact(images=(1,)).manifest, pages=40)))
    assert "the cache has pages and keys of images, which need slots" in crossed
    assert "the cache has one page, which no sequence may hold" in set(faults(with_cache(paged, pages=1)))
    text = next(graph for graph in paged.graphs if graph.kind == "decode")
    without = tuple(spec for spec in text.inputs if spec.name != "block_table")
    broken = msgspec.structs.replace(paged, graphs=(msgspec.structs.replace(text, inputs=without), *paged.graphs))
    assert f"{text.name}: it has no input block_table" in set(faults(broken)) - sound
    few = tuple(
        msgspec.structs.replace(spec, shape=(39, *spec.shape[1:])) if spec.name == "k_cache.0" else spec for spec in text.inputs
    )
    broken = msgspec.structs.replace(paged, graphs=(msgspec.structs.replace(text, inputs=few), *paged.graphs))
    assert f"{text.name}: k_cache.0 has shape [39, 4, 1, 4], the cache [40, 4, 1, 4]" in set(faults(broken)) - sound
