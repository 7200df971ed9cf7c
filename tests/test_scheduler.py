"""What runs next."""

from __future__ import annotations

from staticvl.runtime.engine.conversation import Conversation
from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.options import EngineOptions
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.engine.scheduler import AGING, Step
from staticvl.runtime.processor.prompt import Prompt

from .fake_backend import FakeBackend
from .fakes import check_slots, cross_prompt, fake_artifact, fake_engine, image, image_prompt, run_all, text_prompt

TEN = tuple(range(10, 20))


def add(engine: Engine, prompt: Prompt, max_new_tokens: int = 3) -> Sequence:
    return engine.add_request(prompt, SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True))


def summary(step: Step) -> tuple[str, int, int, tuple[int, ...]]:
    """A step in short: kind, bucket, real size, whose."""
    return step.kind, step.bucket, step.count, tuple(sequence.id for sequence in step.sequences)


def test_one_request_step_by_step() -> None:
    """Four tiles in buckets of 3 and 1, fourteen positions in buckets of 8 and 4, then a token at a time."""
    engine = fake_engine(slots=1, prefill={4: 1.0, 8: 1.5})
    add(engine, image_prompt(5, *(image(n) for n in (1, 2, 3, 4)), 6))
    assert [summary(step) for step in run_all(engine)] == [
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
    assert summary(engine.step()) == ("prefill", 16, 10, (0,))
    assert summary(engine.step()) == ("decode", 1, 1, (0,))
    add(engine, text_prompt(*TEN))
    assert summary(engine.step()) == ("prefill", 16, 10, (1,))
    assert summary(engine.step()) == ("decode", 2, 2, (0, 1))


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
    assert summary(engine.step()) == ("prefill", 4, 1, (long.id,))
    assert waiting.slot == 0
    assert summary(engine.step()) == ("prefill", 4, 1, (waiting.id,))
    assert summary(engine.step()) == ("decode", 2, 2, (long.id, waiting.id))


def test_decode_bucket_reaches_the_highest_slot_in_use() -> None:
    """Slot 0 ends first: the sequence in slot 2 still needs a batch of three or more."""
    engine = fake_engine(slots=4, prefill={4: 1.0, 16: 3.0}, decode={1: 1.0, 2: 1.0, 4: 1.0})
    for count in (2, 2, 4):
        add(engine, text_prompt(7), count)
    steps = [summary(step) for step in run_all(engine) if step.kind == "decode"]
    assert steps == [("decode", 4, 3, (0, 1, 2)), ("decode", 4, 3, (2,)), ("decode", 4, 3, (2,))]
    add(engine, text_prompt(7), 2)
    assert [summary(step)[1] for step in run_all(engine)] == [4, 1]


# --- Prompts and answers take turns -------------------------------------------------------------------------------------

FORTY = text_prompt(*[7] * 40)


def beside_a_stream(prompt: Prompt, **sizes: object) -> list[tuple[str, int]]:
    """What runs while one sequence answers and another one comes: kinds and buckets, until that has its first token."""
    engine = fake_engine(slots=2, decode={2: 1.0}, **sizes)
    add(engine, text_prompt(7), 60)
    engine.step()
    late = add(engine, prompt, 1)
    steps = []
    while not late.generated:
        steps.append(summary(engine.step())[:2])
    return steps


def test_a_stream_waits_for_one_chunk_at_most() -> None:
    """Chunks of 16: each is followed by a token of the stream. Smaller ones run together while they cost no more."""
    costs = {4: 3.0, 16: 8.0}
    chunk, token = ("prefill", 16), ("decode", 2)
    assert beside_a_stream(FORTY, prefill=costs) == [chunk, token, chunk, token, ("prefill", 4), ("prefill", 4)]
    assert beside_a_stream(FORTY, prefill={**costs, 64: 23.0}) == [chunk, chunk, ("prefill", 4), ("prefill", 4)]
    assert beside_a_stream(text_prompt(*[7] * 60), prefill={**costs, 64: 21.0}) == [("prefill", 64)]


def test_the_budget_bounds_chunks_while_somebody_waits() -> None:
    """No larger than the budget then, or of the smallest bucket; as large as is cheapest when nobody waits."""
    costs, token = {4: 3.0, 16: 8.0, 64: 21.0}, ("decode", 2)
    bounded = beside_a_stream(FORTY, prefill=costs, prefill_budget=20)
    assert bounded == [("prefill", 16), token, ("prefill", 16), token, ("prefill", 4), ("prefill", 4)]
    assert beside_a_stream(FORTY, prefill=costs, prefill_budget=1)[:4] == [("prefill", 4), token] * 2
    engine = fake_engine(slots=2, prefill=costs, prefill_budget=20)
    add(engine, text_prompt(*[7] * 60))
    assert summary(engine.step())[:2] == ("prefill", 64)


def test_images_are_encoded_between_tokens_too() -> None:
    images = image_prompt(*(image(n) for n in range(4)), 5)
    steps = beside_a_stream(images, prefill={16: 4.0}, vision={1: 3.0, 2: 9.0})
    assert steps == [*[("vision", 1), ("decode", 2)] * 4, ("prefill", 16)]


def test_who_answers_goes_on_while_prompts_keep_coming() -> None:
    """However many come, a stream gains a token after each of them."""
    engine = fake_engine(slots=4, prefill={16: 4.0}, decode={4: 1.0})
    stream = add(engine, text_prompt(7), 12)
    engine.step()
    while stream.finish_reason is None:
        add(engine, text_prompt(*TEN), 1)
        engine.step()
        engine.step()
    assert engine.metrics.runs == {"vision": 0, "prefill": 1 + 11, "decode": 11, "verify": 0}


# --- Who is next --------------------------------------------------------------------------------------------------------


def test_priorities_go_first_and_nobody_waits_for_ever() -> None:
    """A priority is worth AGING admissions: the plain request that came first goes before the later ones of that rank."""
    engine = fake_engine(slots=1, prefill={16: 1.0})

    def ask(priority: int) -> Sequence:
        return engine.add_request(text_prompt(7), SamplingParams(max_new_tokens=1, priority=priority))

    plain = [ask(0), ask(0)]
    order = []
    urgent = [ask(1)]
    for _ in range(2 * AGING):
        order.append(engine.step().sequences[0])
        urgent.append(ask(1))
    assert order[0] is urgent[0]
    assert order.index(plain[0]) == order.index(plain[1]) - 1 == AGING
    assert order[:AGING] == urgent[:AGING]


def test_equal_priorities_go_in_the_order_of_arrival() -> None:
    engine = fake_engine(slots=1, prefill={16: 1.0})
    ids = [engine.add_request(text_prompt(7), SamplingParams(max_new_tokens=1, priority=p)).id for p in (0, -1, 0, 1, 1, -1)]
    assert [step.sequences[0].id for step in run_all(engine)] == [ids[place] for place in (3, 4, 0, 2, 1, 5)]


def test_deadlines() -> None:
    """Of one that waits, one that is prefilled and one that answers; those without go on."""
    artifact, now = fake_artifact(slots=3, prefill={4: 1.0}), [0.0]
    engine = Engine(artifact.manifest, FakeBackend(artifact.manifest), EngineOptions(reuse=False), clock=lambda: now[0])

    def ask(prompt: Prompt, deadline: float | None) -> Sequence:
        return engine.add_request(prompt, SamplingParams(max_new_tokens=9, ignore_eos=True, deadline_s=deadline))

    free, answers, prefilled, waits = ask(text_prompt(7), None), ask(text_prompt(7), 5.0), ask(FORTY, 5.0), ask(FORTY, 5.0)
    for _ in range(7):
        engine.step()
    assert engine.expire() == []
    now[0] = 4.9
    assert engine.expire() == []
    now[0] = 5.0
    assert engine.expire() == [answers, prefilled, waits]
    assert {sequence.finish_reason for sequence in (answers, prefilled, waits)} == {"deadline"}
    assert answers.generated and 0 < prefilled.computed < 40 and waits.slot is None and waits.timings().total_s == 5.0
    check_slots(engine)
    run_all(engine)
    assert (free.finish_reason, len(free.generated), engine.timed) == ("length", 9, [])


def looking(images: int) -> Prompt:
    """A prompt of ten positions, images first."""
    return cross_prompt(*(((1, 2), n) for n in range(images)), *TEN[images:])


def test_each_prompt_runs_where_just_its_images_can_be_seen() -> None:
    """One vision step for each image, with its tiles; text alone runs without cross-attention."""
    engine = fake_engine(slots=1, prefill={16: 1.0}, images=(1, 3))
    for images in (0, 1, 2, 3):
        add(engine, looking(images))
        steps = run_all(engine)
        assert [(step.kind, step.bucket, step.count) for step in steps[:images]] == [("vision", 4, 4)] * images
        assert {step.graph_key.images for step in steps[:images]} <= {0}
        wanted = [0, 1, 3, 3][images]
        assert [(step.kind, step.graph_key.images) for step in steps[images:]] == [
            ("prefill", wanted),
            *[("decode", wanted)] * 2,
        ]


def test_a_batch_decodes_where_the_most_images_can_be_seen() -> None:
    """And goes back to fewer when that sequence has ended."""
    engine = fake_engine(slots=3, prefill={16: 1.0, 64: 9.0}, images=(1, 3))
    for images, count in ((0, 5), (2, 3), (1, 4)):
        add(engine, looking(images), count)
    steps = [(step.graph_key.images, summary(step)[3]) for step in run_all(engine) if step.kind == "decode"]
    assert steps == [(3, (0, 1, 2)), (3, (0, 1, 2)), (1, (0, 2)), (0, (0,))]


def test_a_sequence_whose_slot_is_parked_does_not_wait() -> None:
    """As the turn of a chat does."""
    engine = fake_engine(slots=2)
    chat, kept = Conversation(), engine.cache.acquire()
    for _ in range(2):
        add(engine, text_prompt(1, 2))
    engine.cache.park(chat, kept)
    turn = engine.new_sequence(text_prompt(3, 4), SamplingParams(max_new_tokens=1))
    engine.resume(turn, chat)
    engine.add(turn)
    assert (turn.slot, engine.slot_of(chat)) == (kept, None)
    engine.step()
    assert turn.finish_reason == "length"
    assert engine.cache.parked == {chat: kept}
    assert engine.slot_of(chat) == kept
    assert len(engine.scheduler.waiting) == 1
    check_slots(engine)
    engine.step()
    assert not engine.cache.parked and not engine.scheduler.waiting
    run_all(engine)
    check_slots(engine)


def test_parked_slots_go_to_those_who_wait() -> None:
    """The one parked the longest ago first, and none while another slot is free."""
    engine = fake_engine(slots=3)
    for chat in "abc":
        engine.cache.park(chat, engine.cache.acquire())
    engine.cache.park("b", engine.cache.take_back("b") or 0)  # had another turn
    first = add(engine, text_prompt(1), 2)
    engine.step()
    assert (first.slot, engine.cache.parked) == (0, {"c": 2, "b": 1})
    second = add(engine, text_prompt(1), 1)
    engine.step()
    assert list(engine.cache.parked) == ["b"]
    run_all(engine)
    assert first.finish_reason == second.finish_reason == "length"
    add(engine, text_prompt(1), 1)
    run_all(engine)
    assert list(engine.cache.parked) == ["b"]
    check_slots(engine)


def test_idle() -> None:
    engine = fake_engine()
    assert engine.scheduler.idle
    add(engine, text_prompt(1), 2)
    assert not engine.scheduler.idle
    engine.step()
    assert not engine.scheduler.idle
    engine.step()
    assert engine.scheduler.idle
