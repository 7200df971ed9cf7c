"""What requests take over from each other, step by step; that it changes no answer is shown in test_many_requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from staticvl import runtime
from staticvl.runtime.artifact import CacheSpec, CrossSpec
from staticvl.runtime.backends.ort import OrtBackend
from staticvl.runtime.engine.cache_keys import cache_keys_of
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions
from staticvl.runtime.engine.prefix_cache import EncoderCache, copy_ms_per_row
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.processor.prompt import Prompt

from .fake_backend import FakeBackend
from .fakes import (
    CROSS_FACTS,
    ROWS_PER_TILE,
    cross_prompt,
    fake_artifact,
    fake_engine,
    image,
    image_prompt,
    noise,
    oracle,
    run_all,
    text_prompt,
)

SHARED = tuple(range(20, 40))
THREE = SamplingParams(max_new_tokens=3, ignore_eos=True)


def engine_of(slots: int = 3, **sizes) -> Engine:
    sizes.setdefault("prefill", {4: 4.0, 8: 7.0})
    sizes.setdefault("decode", {slots: 1.0})
    return fake_engine(slots=slots, reuse=True, **sizes)


def ask(engine: Engine, prompt: Prompt, params: SamplingParams = THREE) -> Sequence:
    sequence = engine.add_request(prompt, params)
    run_all(engine)
    assert sequence.generated == oracle(prompt, params, engine.manifest.model)
    return sequence


# --- Beginnings --------------------------------------------------------------------------------------------------------


def test_a_beginning_is_kept_where_it_lies() -> None:
    engine = engine_of(slots=1)
    first = ask(engine, text_prompt(*SHARED, 5))
    second = ask(engine, text_prompt(*SHARED, 6, 7))
    again = ask(engine, text_prompt(*SHARED, 6, 7))
    assert [each.reused for each in (first, second, again)] == [0, 20, 21], "the last token always runs"
    longer = text_prompt(*SHARED, 6, 7, *again.generated[:2], 9)
    assert ask(engine, longer).reused == 24, "an answer is a beginning as well"
    assert engine.metrics.copies == 0


def test_a_beginning_is_copied_from_a_slot_in_use() -> None:
    """The first goes on in its slot while the second takes its prompt over; a third that has nothing in common does not."""
    engine = engine_of()
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    prompts = [text_prompt(*SHARED, 5), text_prompt(*SHARED, 6), text_prompt(*range(60, 80))]
    sequences = [engine.add_request(prompt, params) for prompt in prompts]
    run_all(engine)
    assert [sequence.generated for sequence in sequences] == [oracle(prompt, params) for prompt in prompts]
    assert [sequence.reused for sequence in sequences] == [0, 20, 0]
    assert (engine.metrics.copies, engine.metrics.copied_tokens) == (1, 20)
    assert engine.metrics.summary()["prefix_hit_rate"] == round(20 / (21 + 21 + 20), 4)


def test_only_what_was_computed_is_taken_over() -> None:
    """A request that was dropped amid its prompt leaves what it had."""
    engine = engine_of()
    dropped = engine.add_request(text_prompt(*SHARED, 5), THREE)
    engine.step()
    assert dropped.computed == 8
    engine.cancel(dropped)
    assert ask(engine, text_prompt(*SHARED, 6)).reused == 8


def test_a_copy_that_costs_more_than_the_run_is_not_made() -> None:
    """Rows are read and written as fast as a decode step reads the model; in the slot itself they cost nothing."""
    artifact = fake_artifact(slots=2, decode={2: 1.0}, prefill={4: 4.0, 8: 7.0})
    slow = [
        msgspec.structs.replace(graph, nbytes=1, cost_ms=1.0) if graph.kind == "decode" else graph
        for graph in artifact.manifest.graphs
    ]
    manifest = msgspec.structs.replace(artifact.manifest, graphs=tuple(slow))
    row = 2 * artifact.manifest.cache.head_dim * 4
    assert copy_ms_per_row(manifest) == 2 * row
    engine = Engine(manifest, FakeBackend(manifest))
    sequences = [engine.add_request(text_prompt(*SHARED, n), THREE) for n in (5, 6)]
    run_all(engine)
    assert [sequence.reused for sequence in sequences] == [0, 0]
    assert ask(engine, text_prompt(*SHARED, 7)).reused == 20
    assert engine.metrics.copies == 0


def test_what_a_slot_held_moves_out_of_the_way() -> None:
    """Batches of one: every request runs in slot 0. What was there before moves away, not onto what the next one needs, and
    onto an earlier state of itself where there is one, so that conversations go on where they were."""
    engine = engine_of(slots=4, decode={1: 1.0, 4: 1.5})
    said = [tuple(range(start, start + 16)) for start in (10, 30, 50)]
    reused = []
    for _ in range(4):
        for place, text in enumerate(said):
            sequence = ask(engine, text_prompt(*text, 7))
            reused.append(sequence.reused)
            said[place] = (*text, 7, *sequence.generated[:2])
    assert reused == [0, 0, 0, *[19] * 3, *[22] * 3, *[25] * 3]
    assert {name for name in (key.name for key in engine.metrics.graph_runs) if name.startswith("decode")} == {"decode-1"}


def test_what_moves_away_does_not_move_onto_what_is_needed() -> None:
    """With three slots for three conversations one is lost, and it is not the one that goes on."""
    engine = engine_of(slots=3, decode={1: 1.0, 3: 1.5})
    said = [text_prompt(*range(start, start + 16), 7) for start in (10, 30, 50)]
    assert [ask(engine, prompt).reused for prompt in (*said, said[0])] == [0, 0, 0, 16]


def test_nothing_is_taken_over_without_reuse() -> None:
    engine = fake_engine(slots=1)
    for _ in range(2):
        ask(engine, image_prompt(5, image(9), 6))
    assert engine.metrics.reused_tokens == engine.metrics.reused_tiles == engine.metrics.copies == 0
    assert engine.metrics.runs["vision"] == 2


# --- Images ----------------------------------------------------------------------------------------------------------


def test_equal_images_are_encoded_once() -> None:
    engine = engine_of(slots=2, vision={1: 1.0})
    ask(engine, image_prompt(5, image(700), image(44), 6))
    assert engine.metrics.runs["vision"] == 2
    other = ask(engine, image_prompt(9, 8, image(700), 7, image(45), 6))
    assert engine.metrics.runs["vision"] == 3, "elsewhere in the text, with another image after"
    assert (other.reused, other.reused_tiles) == (0, 1)
    assert engine.metrics.summary()["picture_hit_rate"] == round(1 / 4, 4)


def test_beginnings_with_different_images_differ() -> None:
    engine = engine_of(slots=1)
    ask(engine, image_prompt(5, 6, image(700), 7, 8))
    assert ask(engine, image_prompt(5, 6, image(701), 7, 8)).reused == 2
    assert ask(engine, image_prompt(5, 6, image(701), 7, 9)).reused == 2 + ROWS_PER_TILE + 1


def test_features_are_bounded() -> None:
    cache, rows = EncoderCache(3 * 48), np.ones((3, 4), np.float32)
    for name in (b"a", b"b", b"c"):
        cache.put(name, rows * name[0])
    assert cache.get(b"a") is not None
    cache.put(b"d", rows)
    assert cache.get(b"b") is None, "the one that was used the longest ago"
    assert [cache.get(name) is not None for name in (b"a", b"c", b"d")] == [True] * 3
    assert cache.nbytes == 3 * 48
    cache.put(b"e", np.ones((9, 9), np.float32))
    assert cache.get(b"e") is None and cache.nbytes == 3 * 48
    kept = cache.get(b"c")
    assert kept is not None and kept[0, 0] == ord("c")


def test_images_of_cross_attention_are_copied_with_the_text() -> None:
    engine = engine_of(images=(2,))
    looking = cross_prompt(5, ((1, 2), 1), 6, ((2, 2), 2), *range(10, 20), seed=1)
    other = replace(looking, token_ids=np.array([*looking.token_ids[:-1], 50], np.int32))
    sequences = [engine.add_request(prompt, THREE) for prompt in (looking, other)]
    run_all(engine)
    assert [s.generated for s in sequences] == [oracle(prompt, THREE, CROSS_FACTS) for prompt in (looking, other)]
    assert [sequence.reused for sequence in sequences] == [0, looking.length - 1]
    assert engine.metrics.runs["vision"] == 2
    third = cross_prompt(5, ((1, 2), 1), 6, ((2, 2), 3), *range(10, 20), seed=1)
    assert ask(engine, third).reused_tiles == 4, "the first image is the same"


def test_answers_about_images_are_beginnings_too() -> None:
    """A next turn by cross-attention sees what the last token of the one before saw."""
    engine = engine_of(images=(1,))
    first = cross_prompt(5, ((1, 2), 1), *range(10, 20), seed=1)
    assert first.cross_attention is not None
    first.cross_attention.gates[-1] = 1
    answer = ask(engine, first).generated
    longer = (*first.token_ids, *answer, 60, 61)
    more = len(longer) - first.length
    cross_attention = replace(
        first.cross_attention,
        visible=np.concatenate((first.cross_attention.visible, np.repeat(first.cross_attention.visible[-1:], more, axis=0))),
        gates=np.concatenate((first.cross_attention.gates, np.repeat(first.cross_attention.gates[-1:], more, axis=0))),
    )
    plain = text_prompt(*longer)
    second = replace(first, token_ids=plain.token_ids, rows=plain.rows, state=plain.state, cross_attention=cross_attention)
    assert ask(engine, second).reused == first.length + len(answer) - 1


# --- What a position is of ---------------------------------------------------------------------------------------------


def keys(prompt: Prompt, *, cross: bool = False) -> list[tuple[int, ...]]:
    return [tuple(key) for key in cache_keys_of(prompt, ROWS_PER_TILE, cross=cross).keys.tolist()]


def test_keys_tell_apart_what_the_cache_tells_apart() -> None:
    text = text_prompt(5, 7)
    assert keys(text) == [(5, 0, 0, 0), (7, 0, 0, 0)]
    stated = replace(text, state=np.array([0, 3], np.int32))
    assert keys(stated) == [(5, 0, 0, 0), (7, 3, 0, 0)]
    shown = keys(image_prompt(5, image(700), image(44)))
    assert [key[0] for key in shown] == [5, -1, -2, -3, -1, -2, -3]
    assert len({key[2:] for key in shown}) == 3
    assert shown[1:4] == keys(image_prompt(image(700)))


def test_keys_of_what_is_seen() -> None:
    """The same token is another where it sees another image, other tiles of it, or through another gate."""
    prompt = cross_prompt(5, ((1, 2), 1), 6, ((2, 2), 2), 7, seed=1)
    assert prompt.cross_attention is not None
    prompt.cross_attention.gates[...] = 1
    prompt.cross_attention.gates[2] = 0
    base = keys(prompt, cross=True)
    assert base[2][2:] == (0, 0), "shut gates see nothing"
    for place, change in enumerate(("visible", "gates", "pixels", "grids")):
        changed = replace(
            prompt,
            cross_attention=replace(
                prompt.cross_attention, visible=prompt.cross_attention.visible.copy(), gates=prompt.cross_attention.gates.copy()
            ),
        )
        prompt.cross_attention.visible[4] = changed.cross_attention.visible[4] = True  # type: ignore[union-attr]
        base = keys(prompt, cross=True)
        if change == "visible":
            changed.cross_attention.visible[4, 5] = False  # type: ignore[union-attr]
        elif change == "gates":
            changed.cross_attention.gates[4, 1] = 0  # type: ignore[union-attr]
        elif change == "pixels":
            changed = replace(changed, pixels=changed.pixels + np.uint8(1))
        else:
            changed = replace(changed, grids=np.array([[2, 1], [2, 2]], np.int32))
        assert keys(changed, cross=True)[4] != base[4], (place, change)


# --- Devices -----------------------------------------------------------------------------------------------------------

SPEC = CacheSpec(
    layers=2,
    kv_heads=2,
    head_dim=3,
    slots=3,
    context=5,
    rows=6,
    dtype="float32",
    cross=CrossSpec(layers=1, images=2, rows=4, tiles=2),
)


def test_every_backend_copies_the_same(tmp_path: Path) -> None:
    """The rows and images asked for and nothing else; as torch and onnxruntime hold their caches."""
    from staticvl.compiler.eager import EagerBackend
    from staticvl.compiler.lockstep import LockstepBackend
    from staticvl.runtime.backends.ascend.backend import AscendBackend, Device

    backends = [
        OrtBackend(tmp_path, SPEC, threads=1),
        EagerBackend(tmp_path, {}, SPEC, lambda *_: pytest.fail("nothing is run")),
        AscendBackend(tmp_path, SPEC, {}, {}, Device("cpu")),
        LockstepBackend(2, lambda _: OrtBackend(tmp_path, msgspec.structs.replace(SPEC, kv_heads=1), threads=1)),
    ]
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SPEC.buffers().items()}
    for backend in backends:
        for name, value in values.items():
            backend.write_cache(name, value)
        backend.copy_slot(2, 0, 4, 1)
        for name, value in values.items():
            wanted = value.copy()
            rows = 4 if not name.startswith("cross") else (None if name.endswith(".0") else 0)
            wanted[0, :, :rows] = value[2, :, :rows]
            np.testing.assert_array_equal(backend.read_cache(name, 3), wanted)


@pytest.fixture
def model(embedded_artifact: Path) -> runtime.Model:
    return runtime.load(embedded_artifact, threads=1)


def test_a_real_cache_is_taken_over(model: runtime.Model) -> None:
    """Logits as of a fresh prompt: the same image, other questions, side by side and one after another."""
    settings = {"max_new_tokens": 6, "ignore_eos": True, "return_logits": True, "temperature": 0.0}
    fresh_model = runtime.Model(model.artifact, Engine(model.engine.manifest, model.engine.backend, EngineOptions(reuse=False)))
    questions = ["What is in the picture?", "Where is the circle?", "What is in the picture?"]
    fresh = [fresh_model.generate(question, noise(1), **settings) for question in questions]
    runs = model.engine.metrics.runs
    outs = [*model.generate(questions, [noise(1)] * 3, **settings), model.generate(questions[1], noise(1), **settings)]
    assert runs["vision"] == 1
    assert all(out.reused_tokens > 64 for out in outs[1:])
    for out, wanted in zip(outs, [*fresh, fresh[1]], strict=True):
        assert out.token_ids == wanted.token_ids
        assert np.abs(out.logits - wanted.logits).max() <= 1e-4 * np.abs(wanted.logits).max()


def test_a_fork_copies_what_the_chat_holds(model: runtime.Model) -> None:
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    with model.chat() as chat, model.chat() as straight:
        said = [talk.send("What is in the picture?", noise(1), **settings) for talk in (chat, straight)]
        with chat.fork() as other:
            answers = [talk.send("Why?", **settings) for talk in (chat, other)]
            other.send("And how?", **settings)
        assert answers[1].token_ids == answers[0].token_ids
        assert answers[1].reused_tokens >= said[0].prompt_tokens
        assert [message.text for message in chat.messages[2:]] == ["Why?", answers[0].text]
    assert model.engine.metrics.runs["vision"] == 1


def test_turns_that_are_taken_back(model: runtime.Model) -> None:
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    with model.chat() as chat:
        chat.send("Hello!", **settings)
        before = list(chat.messages)
        chat.send("What is in the picture?", noise(1), **settings)
        chat.send("Why?", **settings)
        chat.rewind(2)
        assert (chat.messages, chat.images) == (before, [])
        out = chat.send("What is in the picture?", noise(2), **settings)
        text = f"USER: Hello! ASSISTANT: {before[1].text} USER: <image>\nWhat is in the picture? ASSISTANT:"
        assert out.reused_tokens > 8
        fresh = runtime.Model(model.artifact, Engine(model.engine.manifest, model.engine.backend, EngineOptions(reuse=False)))
        assert out.token_ids == fresh.generate(text, noise(2), raw=True, **settings).token_ids
        with pytest.raises(ValueError, match="rewind of 3 turns; the conversation has 2, so give at most that"):
            chat.rewind(3)
