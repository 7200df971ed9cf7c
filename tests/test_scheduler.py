"""What runs next."""

from __future__ import annotations

import pytest

from staticvl.runtime.engine import Engine
from staticvl.runtime.prompt import Prompt
from staticvl.runtime.request import SamplingParams, Sequence
from staticvl.runtime.scheduler import Step

from .fakes import check_slots, cross_prompt, fake_engine, picture, picture_prompt, run_all, text_prompt

TEN = tuple(range(10, 20))


def add(engine: Engine, prompt: Prompt, max_new_tokens: int = 3) -> Sequence:
    return engine.add_request(prompt, SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True))


def told(step: Step) -> tuple[str, int, int, tuple[int, ...]]:
    """A step in short: kind, bucket, real size, whose."""
    return step.kind, step.bucket, step.count, tuple(sequence.id for sequence in step.sequences)


def test_one_request_step_by_step() -> None:
    """Four tiles in buckets of 3 and 1, fourteen positions in buckets of 8 and 4, then a token at a time."""
    engine = fake_engine(slots=1, prefill={4: 1.0, 8: 1.5})
    add(engine, picture_prompt(5, *(picture(n) for n in (1, 2, 3, 4)), 6))
    assert [told(step) for step in run_all(engine)] == [
        ("vision", 3, 3, (0,)),
        ("vision", 1, 1, (0,)),
        ("prefill", 8, 8, (0,)),
        ("prefill", 8, 6, (0,)),
        ("decode", 1, 1, (0,)),
        ("decode", 1, 1, (0,)),
    ]


def test_prefill_comes_before_decode_so_that_batches_fill_up() -> None:
    engine = fake_engine(slots=2, prefill={16: 1.0})
    add(engine, text_prompt(*TEN))
    assert told(engine.step()) == ("prefill", 16, 10, (0,))
    assert told(engine.step()) == ("decode", 1, 1, (0,))
    add(engine, text_prompt(*TEN))
    assert told(engine.step()) == ("prefill", 16, 10, (1,))
    assert told(engine.step()) == ("decode", 2, 2, (0, 1))


def test_first_come_first_served_when_slots_are_short() -> None:
    engine = fake_engine(slots=1)
    for count in (3, 1, 2):
        add(engine, text_prompt(*TEN[:4]), count)
    order = [step.sequences[0].id for step in run_all(engine)]
    assert order == [0, 0, 0, 1, 2, 2]


def test_a_freed_slot_is_taken_at_the_next_step() -> None:
    engine = fake_engine(slots=2, prefill={4: 1.0})
    short, long, waiting = (add(engine, text_prompt(7), count) for count in (1, 6, 2))
    engine.step()
    assert short.finish_reason == "length"
    assert short.slot is None
    assert told(engine.step()) == ("prefill", 4, 1, (long.id,))
    assert waiting.slot == 0
    assert told(engine.step()) == ("prefill", 4, 1, (waiting.id,))
    assert told(engine.step()) == ("decode", 2, 2, (long.id, waiting.id))


def test_decode_bucket_reaches_the_highest_slot_in_use() -> None:
    """Slot 0 ends first: the sequence in slot 2 still needs a batch of three or more."""
    engine = fake_engine(slots=4, prefill={4: 1.0, 16: 3.0}, decode={1: 1.0, 2: 1.0, 4: 1.0})
    for count in (2, 2, 4):
        add(engine, text_prompt(7), count)
    steps = [told(step) for step in run_all(engine) if step.kind == "decode"]
    assert steps == [("decode", 4, 3, (0, 1, 2)), ("decode", 4, 3, (2,)), ("decode", 4, 3, (2,))]
    add(engine, text_prompt(7), 2)
    assert [told(step)[1] for step in run_all(engine)] == [4, 1]


def looking(pictures: int) -> Prompt:
    """A prompt of ten positions, pictures first."""
    return cross_prompt(*(((1, 2), n) for n in range(pictures)), *TEN[pictures:])


def test_each_prompt_runs_where_just_its_pictures_can_be_seen() -> None:
    """One vision step for each picture, with its tiles; text alone runs without cross-attention."""
    engine = fake_engine(slots=1, prefill={16: 1.0}, images=(1, 3))
    for pictures in (0, 1, 2, 3):
        add(engine, looking(pictures))
        steps = run_all(engine)
        assert [(step.kind, step.bucket, step.count) for step in steps[:pictures]] == [("vision", 4, 4)] * pictures
        assert {step.images for step in steps[:pictures]} <= {0}
        wanted = [0, 1, 3, 3][pictures]
        assert [(step.kind, step.images) for step in steps[pictures:]] == [("prefill", wanted), *[("decode", wanted)] * 2]


def test_a_batch_decodes_where_the_most_pictures_can_be_seen() -> None:
    """And goes back to fewer when that sequence has ended."""
    engine = fake_engine(slots=3, prefill={16: 1.0, 64: 9.0}, images=(1, 3))
    for pictures, count in ((0, 5), (2, 3), (1, 4)):
        add(engine, looking(pictures), count)
    steps = [(step.images, told(step)[3]) for step in run_all(engine) if step.kind == "decode"]
    assert steps == [(3, (0, 1, 2)), (3, (0, 1, 2)), (1, (0, 2)), (0, (0,))]


def test_a_sequence_that_brings_its_slot_does_not_wait() -> None:
    """As the turn of a chat does."""
    engine = fake_engine(slots=2)
    kept = engine.cache.acquire()
    for _ in range(2):
        add(engine, text_prompt(1, 2))
    turn = engine.new_sequence(text_prompt(3, 4), SamplingParams(max_new_tokens=1))
    turn.slot, turn.keep_slot = kept, True
    engine.scheduler.add(turn)
    engine.step()
    engine.step()
    assert turn.finish_reason == "length"
    assert turn.slot == kept
    assert len(engine.scheduler.waiting) == 1
    run_all(engine)
    check_slots(engine, kept=1)


def test_all_slots_held_by_chats() -> None:
    engine = fake_engine(slots=3)
    slots = [engine.cache.acquire() for _ in range(3)]
    waiting = add(engine, text_prompt(1))
    with pytest.raises(RuntimeError, match=r"all 3 slots are held by chats.*close a chat.*staticvl compile \.\.\. --slots 6"):
        engine.step()
    engine.cache.release(slots[1])
    run_all(engine)
    assert waiting.finish_reason == "length"


def test_idle() -> None:
    engine = fake_engine()
    assert engine.scheduler.idle
    add(engine, text_prompt(1), 2)
    assert not engine.scheduler.idle
    engine.step()
    assert not engine.scheduler.idle
    engine.step()
    assert engine.scheduler.idle
