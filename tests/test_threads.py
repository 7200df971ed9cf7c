"""One model used from several threads: every answer is the one that the same call gives alone."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import GraphKey
from staticvl.runtime.async_engine import AsyncEngine
from staticvl.runtime.engine.access import EngineAccess, InterruptedStepError
from staticvl.runtime.model import ModelClosedError

from .conftest import EMBEDDED
from .fakes import check_slots, fake_model, noise

BUCKETS = Buckets(prefill=(8, 32), decode=(1, 2, 4), vision=(1, 2), context=512, slots=4)
TEXTS = ("What is in the picture?", "Where is the circle?", "Hello!", "日本 🙂", "a " * 20)
PATIENCE = 60  # seconds, for what would otherwise hang
LONG = {"max_new_tokens": 60, "ignore_eos": True}


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model(tmp_path: Path) -> runtime.Model:
    return fake_model(EMBEDDED, tmp_path / "artifact", BUCKETS, reuse=True)


@pytest.fixture
def real(embedded_artifact: Path) -> Iterator[runtime.Model]:
    """Decode steps of one shape only, so that answers are the same bits whatever runs beside them."""
    with runtime.load(embedded_artifact, reuse=False, threads=1) as model:
        model.engine.scheduler.decode = {0: [GraphKey("decode", 4)]}
        yield model


def check_idle(model: runtime.Model) -> None:
    """Nothing is left behind but chats' slots, which are given back when they are closed."""
    assert model.engine.scheduler.idle
    check_slots(model.engine)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin at once, each in a thread of its own."""
    start = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(begin, call) for call in calls]]


def said(out: runtime.Output) -> tuple[Any, ...]:
    return out.token_ids, out.text, out.finish_reason, [said(other) for other in out.others]


# ---- one call of each kind; `number` makes them differ


def listed(model: runtime.Model, number: int) -> Any:
    texts = [TEXTS[(number + k) % len(TEXTS)] for k in range(3)]
    return [said(out) for out in model.generate(texts, [None, noise(number % 3), None], max_new_tokens=4 + number % 5)]


def streamed(model: runtime.Model, number: int) -> Any:
    return "".join(model.stream(TEXTS[number % len(TEXTS)], max_new_tokens=12, ignore_eos=True))


def sampled(model: runtime.Model, number: int) -> Any:
    return said(model.generate(TEXTS[number % len(TEXTS)], n=3, temperature=1.5, seed=number, max_new_tokens=7))


def chatted(model: runtime.Model, number: int) -> Any:
    with model.chat() as chat:
        first = chat.send(TEXTS[number % len(TEXTS)], noise(number % 3), max_new_tokens=6)
        second = "".join(chat.stream("Why?", max_new_tokens=6))
        with chat.fork() as other:
            return said(first), second, said(other.send("And then?", max_new_tokens=4))


def abandoned(model: runtime.Model, number: int) -> Any:
    """A stream that is dropped after two pieces, within a cycle, so that any thread may find it."""
    stream = model.stream(TEXTS[number % len(TEXTS)], **LONG)
    pieces = [next(stream), next(stream)]
    cycle: list[Any] = [stream]
    cycle.append(cycle)
    return pieces


CALLS = (listed, streamed, sampled, chatted, abandoned)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_mixed_calls_of_several_threads(model: runtime.Model, count: int) -> None:
    """Each thread makes several calls in a row."""
    plans = [[(CALLS[(thread + k) % len(CALLS)], thread * 7 + k) for k in range(5)] for thread in range(count)]
    alone = [[call(model, number) for call, number in plan] for plan in plans]
    got = together(*(lambda plan=plan: [call(model, number) for call, number in plan] for plan in plans))
    assert got == alone
    gc.collect()
    check_idle(model)
    assert model.engine.cache.free == BUCKETS.slots


def test_mixed_calls_on_a_real_model(real: runtime.Model) -> None:
    plans = [[(CALLS[(thread + k) % 4], thread * 3 + k) for k in range(2)] for thread in range(4)]
    alone = [[call(real, number) for call, number in plan] for plan in plans]
    assert together(*(lambda plan=plan: [call(real, number) for call, number in plan] for plan in plans)) == alone
    check_idle(real)


def test_threads_share_a_batch(model: runtime.Model) -> None:
    """Four answers of 60 tokens, begun before any of them goes on, take little more steps than one."""
    model.generate("Hello!", **LONG)
    alone = sum(model.engine.metrics.runs.values())
    streams = [model.stream("Hello!", **LONG) for _ in range(4)]
    first = [next(stream) for stream in streams]
    rests = together(*(lambda stream=stream: "".join(stream) for stream in streams))
    assert len({one + rest for one, rest in zip(first, rests, strict=True)}) == 1
    assert sum(model.engine.metrics.runs.values()) < 3 * alone


def test_beside_an_async_engine(model: runtime.Model) -> None:
    plan = [(CALLS[k % len(CALLS)], k) for k in range(10)]
    alone = [call(model, number) for call, number in plan]
    answers = [model.generate(text, **LONG).text for text in TEXTS]

    async def work() -> tuple[list[str], Any]:
        async with AsyncEngine(model) as engine:
            calls = [asyncio.to_thread(lambda k=k: plan[k][0](model, plan[k][1])) for k in range(len(plan))]
            got = await asyncio.gather(*(engine.generate(text, **LONG) for text in TEXTS), *calls)
            return [out.text for out in got[: len(TEXTS)]], got[len(TEXTS) :]

    assert asyncio.run(asyncio.wait_for(work(), PATIENCE)) == (answers, alone)
    gc.collect()
    check_idle(model)


# ---- one chat, several threads


def test_turns_that_threads_send_to_one_chat(model: runtime.Model) -> None:
    """In some order, each answered as the transcript before it says."""
    with model.chat() as chat:
        outs = together(*(lambda text=text: (text, chat.send(text, max_new_tokens=6)) for text in TEXTS))
        answers = {text: out.text for text, out in outs}
        assert len(chat.messages) == 2 * len(TEXTS)
        with model.chat() as again:
            for ask, answer in zip(chat.messages[::2], chat.messages[1::2], strict=True):
                assert again.send(ask.text, max_new_tokens=6).text == answer.text == answers[ask.text]
    check_idle(model)


def test_a_chat_that_is_forked_taken_back_and_closed_by_others(model: runtime.Model) -> None:
    """Whatever the order, pairs of words stay together, and what is said next is answered as those that are left say."""
    with model.chat() as chat:

        def speak() -> None:
            for _ in range(4):
                chat.send("Hello!", max_new_tokens=5)

        def read() -> None:
            for _ in range(4):
                for _piece in chat.stream("Where is the circle?", max_new_tokens=5):
                    pass

        def disturb() -> None:
            for k in range(12):
                (chat.fork, chat.close, lambda: chat.rewind(0), chat.fork)[k % 4]()

        together(speak, read, disturb)
        assert [message.role for message in chat.messages] == ["user", "assistant"] * (len(chat.messages) // 2)
        kept = [message.text for message in chat.messages]
        with chat.fork() as other:
            assert other.send("Why?", max_new_tokens=5).token_ids == chat.send("Why?", max_new_tokens=5).token_ids
        assert [message.text for message in chat.messages[:-2]] == kept
    check_idle(model)
    assert model.engine.cache.free == BUCKETS.slots


def test_the_garbage_collector_in_the_middle_of_a_step(model: runtime.Model) -> None:
    """It closes a stream and a chat of another thread there, which takes effect after the step."""
    wanted = model.generate("Hello!", **LONG).text
    device, running = model.engine.backend.run, []

    def run(*args: Any) -> Any:
        if not running:  # once is enough, and takes long in a large process
            gc.collect()
        running.append(len(model.engine.scheduler.running))
        return device(*args)

    def leave() -> None:
        chat = model.chat()
        chat.send("Where is the circle?", max_new_tokens=2)
        streams = [model.stream("Why?", **LONG), chat.stream("Why?", **LONG)]
        cycle: list[Any] = [chat, *map(next, streams), *streams]
        cycle.append(cycle)

    gc.disable()
    try:
        together(leave)
        assert len(model.engine.scheduler.running) == 2
        model.engine.backend.run = run  # type: ignore[method-assign]
        assert model.generate("Hello!", **LONG).text == wanted
    finally:
        gc.enable()
    assert running[0] == 3 and set(running[1:]) == {1}
    assert model.engine.metrics.finished["cancelled"] == 2
    check_idle(model)
    assert model.engine.cache.free == BUCKETS.slots


def test_closing_a_chat_whose_turn_is_sent(model: runtime.Model) -> None:
    """The answer comes as far as it got, and is not kept; here the step's own thread closes it, which waits for the step."""
    device, left = model.engine.backend.run, iter(range(9))
    chat = model.chat()

    def run(*args: Any) -> Any:
        if next(left, None) is None:
            chat.close()
        return device(*args)

    wanted = model.generate("Hello!", **LONG)
    model.engine.backend.run = run  # type: ignore[method-assign]
    out = chat.send("Hello!", **LONG)
    assert out.finish_reason == "cancelled" and 0 < len(out.token_ids) < 12
    assert out.token_ids == wanted.token_ids[: len(out.token_ids)]
    assert chat.messages == [] and chat.slot is None
    check_idle(model)
    assert model.engine.cache.free == BUCKETS.slots


# ---- close, and interrupts


class Gate:
    """Holds the device in its n-th run until it is opened."""

    def __init__(self, model: runtime.Model, at: int) -> None:
        self.run, self.left = model.engine.backend.run, at
        self.reached, self.opened = threading.Event(), threading.Event()
        model.engine.backend.run = self.held  # type: ignore[method-assign]

    def held(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.opened.wait(PATIENCE)
        return self.run(*args)


@pytest.mark.parametrize("call", [listed, streamed, sampled, chatted])
def test_closing_a_model_beside_calls_of_other_threads(model: runtime.Model, call: Callable[..., Any]) -> None:
    gate, at_last, begun = Gate(model, 3), model.access.at_last, threading.Event()

    def noted(*work: Any) -> None:
        begun.set()
        at_last(*work)

    model.access.at_last = noted  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, model, number) for number in range(2)]
        assert gate.reached.wait(PATIENCE)
        closing = [pool.submit(model.close) for _ in range(2)]
        assert begun.wait(PATIENCE)
        gate.opened.set()
        for future in closing:
            future.result(PATIENCE)
        for future in calls:
            with pytest.raises(ModelClosedError, match=r"closed before the answer was complete|the model was closed; load"):
                future.result(PATIENCE)
    model.close()
    with pytest.raises(ModelClosedError, match="the model was closed; load the artifact again"):
        model.generate("Hello!")
    check_idle(model)


def test_closing_a_model_ends_what_an_async_engine_answers(model: runtime.Model) -> None:
    async def work() -> None:
        async with AsyncEngine(model) as engine:
            stream = engine.stream("Hello!", max_new_tokens=400, ignore_eos=True)
            await anext(stream)
            await asyncio.to_thread(model.close)
            with pytest.raises(ModelClosedError):
                async for _ in stream:
                    pass
            with pytest.raises(ModelClosedError):
                await engine.generate("Hello!")

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_a_call_in_the_middle_of_a_step_of_the_same_thread(model: runtime.Model) -> None:
    """As by a signal handler: a clear error, and a close that waits for the end of the step."""
    device, caught = model.engine.backend.run, []

    def run(*args: Any) -> Any:
        if not caught:
            try:
                model.generate("Hello!")
            except RuntimeError as error:
                caught.append(error)
            model.close()
        return device(*args)

    model.engine.backend.run = run  # type: ignore[method-assign]
    with pytest.raises(ModelClosedError):
        model.generate("Where is the circle?")
    assert "in the middle of its own step" in str(caught[0])
    check_idle(model)


def test_an_interrupt_in_the_device_concerns_one_thread(model: runtime.Model) -> None:
    """Ctrl-C in a call of the main thread: what others asked for goes on."""
    wanted = model.generate("Where is the circle?", **LONG).text
    stream = model.stream("Where is the circle?", **LONG)
    first = next(stream)
    device, left = model.engine.backend.run, iter(range(3))

    def run(*args: Any) -> Any:
        if next(left, None) is None:
            model.engine.backend.run = device  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGINT)
        return device(*args)

    model.engine.backend.run = run  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.generate(["Hello!"] * 4, **LONG)
    assert first + together(lambda: "".join(stream))[0] == wanted
    check_idle(model)


def test_an_interrupt_between_runs_ends_what_runs_with_a_clear_error(
    model: runtime.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = model.generate("Hello!", **LONG).text
    stream = model.stream("Where is the circle?", **LONG)
    next(stream)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.engine.cache, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate("Hello!", **LONG)
    with pytest.raises(InterruptedStepError, match="KeyboardInterrupt ended a step in the middle, and every request"):
        next(stream)
    assert model.generate("Hello!", **LONG).text == wanted
    check_idle(model)


# ---- the lock itself


def test_work_goes_before_the_next_step() -> None:
    """A thread that runs steps in a loop lets in whoever waits, after the step that runs."""
    access, third, waits = EngineAccess(lambda _: None), threading.Event(), threading.Event()
    steps: list[int] = []
    let_in: list[int] = []
    door = access._door

    class Door:
        def __enter__(self) -> None:
            door.acquire()
            if third.is_set():
                waits.set()

        def __exit__(self, *_: object) -> None:
            door.release()

    def step() -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            third.set()
            assert waits.wait(PATIENCE)

    access._door = Door()  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        leader = pool.submit(access.until, lambda: bool(let_in), step)
        assert third.wait(PATIENCE)
        pool.submit(access.exclusively, lambda: let_in.append(len(steps))).result(PATIENCE)
        leader.result(PATIENCE)
    assert let_in == [3]


def test_what_is_left_for_later_is_done_by_the_holder() -> None:
    access, done = EngineAccess(lambda _: None), []

    def work() -> None:
        access.soon(done.append, 1)
        access.at_last(done.append, 2)
        assert not done

    access.exclusively(work)
    access.soon(done.append, 3)
    assert done == [1, 2, 3]


def test_work_that_fails_later_is_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    access = EngineAccess(lambda _: None)
    access.soon(lambda: 1 / 0)
    assert "division by zero" in caplog.text
    assert access.exclusively(lambda: 5) == 5
