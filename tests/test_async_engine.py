"""Requests of several tasks at once: every answer is the one that the model gives alone, and whoever leaves frees a slot."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime import async_engine
from staticvl.runtime.async_engine import AsyncEngine
from staticvl.runtime.backends.distributed.failures import RankError
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.processor.prompt import Message, PromptError

from .conftest import EMBEDDED
from .fakes import fake_model, noise

BUCKETS = Buckets(prefill=(8, 32), decode=(1, 2, 4), vision=(1, 2), context=512, slots=4)
PROMPTS = ("What is in the picture?", "Where is the circle?", "a " * 30, "日本 🙂", "Hello!", "...")
LONG = {"max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture
def model(tmp_path: Path) -> runtime.Model:
    return fake_model(EMBEDDED, tmp_path / "artifact", BUCKETS, reuse=True)


def run(work: Coroutine[Any, Any, Any], model: runtime.Model) -> Any:
    """To the end, within half a minute; nothing may be left behind."""
    result = asyncio.run(asyncio.wait_for(work, 30))
    assert model.engine.cache.free == model.engine.cache.spec.slots
    assert model.engine.scheduler.idle
    assert not [thread for thread in threading.enumerate() if thread.name == "staticvl-engine"]
    return result


async def joined(stream: Any) -> str:
    return "".join([piece async for piece in stream])


def test_many_tasks_at_once(model: runtime.Model) -> None:
    """More requests than slots, some streamed, with and without images."""
    requests = [(prompt, noise(i) if i % 2 else None) for i, prompt in enumerate(PROMPTS * 3)]
    alone = [model.generate(prompt, image, max_new_tokens=12) for prompt, image in requests]

    async def work() -> list[Any]:
        async with AsyncEngine(model) as engine:
            tasks = [
                joined(engine.stream(*each, max_new_tokens=12)) if i % 3 else engine.generate(*each, max_new_tokens=12)
                for i, each in enumerate(requests)
            ]
            return await asyncio.gather(*tasks)

    for got, wanted in zip(run(work(), model), alone, strict=True):
        if isinstance(got, str):
            assert got == wanted.text
        else:
            assert (got.text, got.token_ids, got.finish_reason) == (wanted.text, wanted.token_ids, wanted.finish_reason)


def test_an_answer_comes_in_pieces(model: runtime.Model) -> None:
    async def work() -> list[str]:
        async with AsyncEngine(model) as engine:
            return [piece async for piece in engine.stream("Hello!", **LONG)]

    pieces = run(work(), model)
    assert pieces == list(model.stream("Hello!", **LONG))
    assert len(pieces) > 5


@pytest.fixture
def slow(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes its time, so that a long answer is not over before somebody leaves."""
    device = model.engine.backend.run
    monkeypatch.setattr(model.engine.backend, "run", lambda *args: (time.sleep(0.01), device(*args))[1])


async def until_idle(model: runtime.Model) -> None:
    while not model.engine.scheduler.idle:
        await asyncio.sleep(0.001)


@pytest.mark.usefixtures("slow")
def test_a_stream_that_is_closed_cancels_its_request(model: runtime.Model) -> None:
    async def work() -> tuple[str, str]:
        async with AsyncEngine(model) as engine:
            stream = engine.stream("Hello!", max_new_tokens=400, ignore_eos=True)
            await anext(stream)
            other = engine.stream("Where is the circle?", **LONG)
            first = await anext(other)
            await stream.aclose()
            rest = await joined(other)
            await until_idle(model)
            assert model.engine.metrics.finished["cancelled"] == 1
            return first, rest

    expected = model.generate("Where is the circle?", **LONG).text
    assert "".join(run(work(), model)) == expected


@pytest.mark.usefixtures("slow")
def test_cancelling_a_task_cancels_its_request(model: runtime.Model) -> None:
    async def work() -> None:
        async with AsyncEngine(model) as engine:
            task = asyncio.create_task(engine.generate("Hello!", max_new_tokens=400, ignore_eos=True, n=3))
            while not model.engine.scheduler.running:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_idle(model)
            assert model.engine.metrics.finished["cancelled"] == 3

    run(work(), model)


def test_several_answers(model: runtime.Model) -> None:
    settings = {"n": 3, "temperature": 2.0, "seed": 4, "max_new_tokens": 9}

    async def work() -> runtime.Output:
        async with AsyncEngine(model) as engine:
            return await engine.generate("Hello!", **settings)

    wanted = model.generate("Hello!", **settings)
    got = run(work(), model)
    assert [out.token_ids for out in (got, *got.others)] == [out.token_ids for out in (wanted, *wanted.others)]


def test_a_conversation_without_a_chat(model: runtime.Model) -> None:
    """The next turn takes over what the last one left."""
    messages = [Message("user", "What is it?", 1)]

    async def work() -> tuple[runtime.Output, runtime.Output]:
        async with AsyncEngine(model) as engine:
            first = await engine.generate(messages, noise(1), max_new_tokens=5)
            more = [*messages, Message("assistant", first.text), Message("user", "Why?")]
            return first, await engine.generate(more, noise(1), max_new_tokens=5)

    first, second = run(work(), model)
    assert second.reused_tokens >= first.prompt_tokens - 1
    assert model.engine.metrics.runs["vision"] == 1


def test_errors_reach_whoever_asked(model: runtime.Model) -> None:
    async def work() -> str:
        async with AsyncEngine(model) as engine:
            with pytest.raises(PromptError, match="1 <image> mark but 2 images"):
                await engine.generate("<image> what?", [noise(1), noise(2)])
            with pytest.raises(ContextError):
                await engine.generate("Hello", max_new_tokens=600)
            with pytest.raises(TypeError, match="unknown settings beams"):
                await engine.generate("Hello", beams=4)
            with pytest.raises(ValueError, match="n is 2; a stream"):
                await anext(engine.stream("Hello", n=2))
            return (await engine.generate("Hello!", max_new_tokens=3)).text

    expected = model.generate("Hello!", max_new_tokens=3).text
    assert run(work(), model) == expected


def test_a_failing_device_fails_those_who_wait_and_no_other(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device, left = model.engine.backend.run, iter(range(5))

    def failing(*args: Any) -> Any:
        if next(left, None) is None:
            raise OSError("the device is gone")
        return device(*args)

    async def work() -> str:
        async with AsyncEngine(model) as engine:
            monkeypatch.setattr(model.engine.backend, "run", failing)
            results = await asyncio.gather(*(engine.generate(p, **LONG) for p in PROMPTS), return_exceptions=True)
            assert all(isinstance(result, OSError) for result in results)
            monkeypatch.undo()
            return (await engine.generate("Hello!", max_new_tokens=3)).text

    expected = model.generate("Hello!", max_new_tokens=3).text
    assert run(work(), model) == expected


def test_answers_come_with_their_tokens_and_their_whole(model: runtime.Model) -> None:
    """Pieces of all answers through one generator, a prompt made ready before, log-probabilities none twice."""
    settings = runtime.SamplingParams(n=2, temperature=2.0, seed=4, max_new_tokens=9, logprobs=1)

    async def work() -> list[tuple[int, Any]]:
        async with AsyncEngine(model) as engine:
            prompt = await engine.prepare("Hello!")
            assert prompt.length == model.processor.prompt("Hello!").length
            async with await engine.submit(prompt, settings) as answers:
                return [item async for item in answers]

    got = run(work(), model)
    wanted = model.generate("Hello!", sampling=settings)
    for index, out in enumerate((wanted, *wanted.others)):
        *pieces, last = [item for at, item in got if at == index]
        assert (last.token_ids, last.text) == (out.token_ids, out.text)
        assert "".join(piece.text for piece in pieces) == out.text
        assert [each for piece in pieces for each in piece.logprobs] == out.logprobs


@pytest.mark.usefixtures("slow")
def test_a_full_disk_under_the_request_log_fails_nobody(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: object) -> None:
            raise OSError("no space left")

    async def work() -> list[str]:
        async with AsyncEngine(model) as engine:
            stream = engine.stream("Hello!", max_new_tokens=400, ignore_eos=True)
            await anext(stream)
            await stream.aclose()
            return [(await engine.generate("Hello!", max_new_tokens=3)).text for _ in range(2)]

    expected = model.generate("Hello!", max_new_tokens=3).text
    monkeypatch.setattr(model, "request_log", Full())
    assert run(work(), model) == [expected, expected]


def test_after_a_rank_has_died_all_are_told_so(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: Any) -> Any:
        raise RankError("rank 1 died")

    async def work() -> None:
        async with AsyncEngine(model) as engine:
            monkeypatch.setattr(model.engine.backend, "run", dying)
            for _ in range(2):
                with pytest.raises(RankError, match="rank 1 died"):
                    await engine.generate("Hello!")
            assert str(engine.failure) == "rank 1 died"

    run(work(), model)


def test_a_rank_that_dies_while_nobody_asks_is_noticed(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    well = threading.Event()
    well.set()

    class Ranks:
        def check(self) -> None:
            if not well.is_set():
                raise RankError("rank 1 died")

        def close(self) -> None: ...

    async def work() -> None:
        async with AsyncEngine(model) as engine:
            noticed = threading.Event()
            engine.on_failure = noticed.set
            assert (await engine.generate("Hello!", max_new_tokens=3)).text
            well.clear()
            await asyncio.to_thread(noticed.wait, 30)
            with pytest.raises(RankError, match="rank 1 died"):
                await engine.generate("Hello!")

    monkeypatch.setattr(async_engine, "CHECK_S", 0.01)
    model.ranks = Ranks()
    run(work(), model)


def test_closing_ends_what_runs(model: runtime.Model) -> None:
    async def work() -> None:
        engine = AsyncEngine(model)
        stream = engine.stream("Hello!", max_new_tokens=400, ignore_eos=True)
        await anext(stream)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed before the answer was complete"):
            await joined(stream)
        with pytest.raises(RuntimeError, match="the engine was closed; open another one"):
            await engine.generate("Hello!")

    run(work(), model)


@pytest.mark.usefixtures("slow")
def test_deadlines_end_requests_that_wait_and_that_run(model: runtime.Model) -> None:
    """The clock strikes once all have come and one has said four tokens, however fast the machine."""
    struck: list[float] = []
    scheduler = model.engine.scheduler

    def clock() -> float:
        come = len(scheduler.running) + len(scheduler.waiting)
        if come == 6 and any(len(sequence.generated) > 3 for sequence in scheduler.running):
            struck.append(6.0)
        return struck[0] if struck else 0.0

    model.engine.clock = clock

    async def work() -> list[runtime.Output]:
        async with AsyncEngine(model) as engine:
            requests = [engine.generate("Hello!", max_new_tokens=300, ignore_eos=True, deadline_s=5.0) for _ in range(6)]
            return await asyncio.gather(*requests)

    outs = run(work(), model)
    assert {out.finish_reason for out in outs} == {"deadline"}
    assert sum(not out.token_ids for out in outs) >= 2
    assert max(len(out.token_ids) for out in outs) > 3
