"""Whatever raises in a step, wherever: the requests that it concerns fail with it, and every later answer is right."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.async_engine import AsyncEngine
from staticvl.runtime.engine import cache, conversation, engine, metrics, next_token, request, scheduler
from staticvl.runtime.engine import prefix_cache as reuse
from staticvl.runtime.engine.access import InterruptedStepError
from staticvl.runtime.engine.request import Sequence
from staticvl.runtime.processor import detokenizer as text
from staticvl.runtime.processor import tokenizer

from .checkpoints_mllama import tiny_mllama
from .conftest import EMBEDDED
from .fake_backend import FakeBackend
from .fakes import check_slots, fake_model, noise

SLOTS = 3
BUCKETS = Buckets(prefill=(4, 16, 64), decode=(1, 2, SLOTS), vision=(1, 2), verify=(3, 6), context=512, slots=SLOTS)
CROSS = Buckets(prefill=(4, 16, 64), decode=(1, 2, SLOTS), verify=(3, 6), context=512, slots=SLOTS, images=(1, 2))
TEXTS = ("Hello!", "What is in the picture?", "a b c d e f g h i j k l m n", "Where is the circle? " * 3)
IMAGES = [noise(seed, (20, 20)) for seed in range(3)]
FAMILIES = ("llava", "mllama")
PATIENCE = 60


class DeviceError(Exception):
    """Raised on purpose."""


ERRORS = (DeviceError, MemoryError, KeyboardInterrupt)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., runtime.Model]:
    folder = tmp_path_factory.mktemp("failures")
    checkpoints = {"llava": EMBEDDED, "mllama": tiny_mllama(folder / "mllama").folder}

    def make_model(family: str, **settings: Any) -> runtime.Model:
        place = Path(tmp_path_factory.mktemp(family))
        return fake_model(checkpoints[family], place, CROSS if family == "mllama" else BUCKETS, **settings)

    return make_model


class Faulty(FakeBackend):
    """Every so many calls, one raises: before it has done anything, after all of it, or, where it copies, in between."""

    every: int | None = None
    calls = raised = 0
    rng: random.Random

    def fails(self) -> bool:
        self.calls += 1
        if not self.every or self.calls % self.every:
            return False
        self.raised += 1
        return True

    def error(self) -> BaseException:
        return self.rng.choice(ERRORS)("on purpose")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.fails():
            return super().run(*args, **kwargs)
        if self.rng.random() < 0.5:
            super().run(*args, **kwargs)
        raise self.error()

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        if self.fails():
            self.kept[target, :rows] = self.rng.randint(0, 10**6)  # whatever half a copy leaves
            raise self.error()
        super().copy_slot(source, target, rows, images)


def make_faulty(model: runtime.Model, seed: int) -> Faulty:
    backend = Faulty(model.artifact.manifest)
    backend.rng = random.Random(seed)
    model.engine.reset(DeviceError())  # a new device holds nothing
    model.engine.backend = backend
    if model.engine.scheduler.prefix_cache:
        model.engine.scheduler.prefix_cache.backend = backend  # type: ignore[attr-defined]
    return backend


class Traffic:
    """Random requests and turns of chats; those that end without an error are as alone."""

    def __init__(self, model: runtime.Model, alone: runtime.Model, seed: int) -> None:
        self.model, self.alone, self.rng = model, alone, np.random.default_rng(seed)
        self.known: dict[Any, list[int]] = {}
        self.right = self.failed = self.interrupts = 0

    def draw(self) -> tuple[str, list[Any], dict[str, Any]]:
        rng = self.rng
        chosen: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 9)), "ignore_eos": True, "temperature": 0.0}
        if rng.random() < 0.3:
            chosen |= {"temperature": 0.7, "seed": int(rng.integers(4)), "bad_words": ("e",), "logprobs": 1}
        return str(rng.choice(TEXTS)), [IMAGES[i] for i in rng.integers(0, 3, rng.choice([0, 0, 1, 2]))], chosen

    def wanted(self, drawn_request: tuple[str, list[Any], dict[str, Any]]) -> list[int]:
        words, images, chosen = drawn_request
        key = words, tuple(map(id, images)), tuple(chosen.items())
        if key not in self.known:
            self.known[key] = self.alone.generate(words, images, **chosen).token_ids
        return self.known[key]

    def run(self, count: int) -> None:
        alive: list[tuple[Sequence, list[int]]] = []
        while count or alive:
            if count and self.rng.random() < 0.4:
                count -= 1
                drawn_request = self.draw()
                if self.rng.random() < 0.2:
                    self.turns(drawn_request)
                    continue
                wanted = self.wanted(drawn_request)
                words, images, chosen = drawn_request
                prompt = self.model.processor.prompt(words, images)
                sequence = self.model.new_sequence(prompt, runtime.SamplingParams(**chosen))
                alive.append((sequence, wanted))
                self.guarded(lambda sequence=sequence: self.model.start(sequence))
            self.guarded(self.model.advance)
            alive = [each for each in alive if not self.ended(*each)]

    def guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except KeyboardInterrupt:
            self.interrupts += 1
        if self.model.engine.torn is None:
            check_slots(self.model.engine)

    def ended(self, sequence: Sequence, wanted: list[int]) -> bool:
        if not sequence.finish_reason and sequence.text is not None:
            return False
        if sequence.finish_reason == "length":
            assert self.model.output(sequence).token_ids == wanted
            self.right += 1
        elif sequence.finish_reason:
            assert sequence.finish_reason == "failed"
            with pytest.raises(
                (DeviceError, MemoryError, InterruptedStepError), match=r"on purpose|ended a step in the middle"
            ):
                self.model.output(sequence)
            self.failed += 1
        self.model.end(sequence)
        return True

    def turns(self, drawn_request: tuple[str, list[Any], dict[str, Any]]) -> None:
        """Two turns of a chat, beside what runs; one that fails leaves the conversation as it was."""
        words, images, chosen = drawn_request
        with self.model.chat() as chat:
            for k in range(2):
                try:
                    out = chat.send(words, [] if k else images, **chosen)
                except (DeviceError, MemoryError, InterruptedStepError, KeyboardInterrupt):
                    assert len(chat.messages) in (0, 2)
                    self.failed += 1
                    return
                if not k:
                    assert out.token_ids == self.wanted(drawn_request)
                self.right += 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [3, 7, 13, 29, 61])
def test_a_device_that_fails_every_so_often(make: Callable[..., runtime.Model], family: str, every: int) -> None:
    model, alone = make(family, reuse=True, speculate=5, prefill_budget=16), make(family)
    backend = make_faulty(model, every)
    traffic = Traffic(model, alone, every)
    backend.every = every
    traffic.run(30)
    assert traffic.failed and (traffic.right or every < 13)
    assert backend.raised > 2
    check_whole(model, backend, traffic)


def check_whole(model: runtime.Model, backend: Faulty, traffic: Traffic) -> None:
    """Nothing is left behind, and everything that comes later is answered."""
    assert model.engine.scheduler.idle and model.engine.cache.free == SLOTS
    backend.every, traffic.failed, traffic.right = None, 0, 0
    traffic.run(9)
    assert traffic.right >= 9 and not traffic.failed
    assert model.engine.scheduler.idle and model.engine.cache.free == SLOTS


# ---- an exception at any line


MODULES = cache, conversation, engine, metrics, next_token, request, reuse, scheduler, text, tokenizer
FILES = {module.__file__ for module in MODULES}


class AtLine:
    """Raises at the n-th line that any thread runs in the engine's files."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error = at, error

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise self.error("on purpose")
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)


@pytest.fixture(scope="module")
def lines(make: Callable[..., runtime.Model]) -> Iterator[tuple[runtime.Model, runtime.Model]]:
    yield make("llava", reuse=True, speculate=2), make("llava")


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 100))])
def test_an_exception_at_any_line_of_the_engine(lines: tuple[runtime.Model, runtime.Model], seed: int) -> None:
    """As an interrupt comes, or a lack of memory."""
    model, alone = lines
    backend, traffic = make_faulty(model, seed), Traffic(model, alone, seed)
    rng = random.Random(seed)
    error = rng.choice((KeyboardInterrupt, MemoryError))
    calls: list[Callable[[], Any]] = [
        lambda: model.generate([TEXTS[2], TEXTS[1]], [None, IMAGES[1]], max_new_tokens=4, n=2),
        lambda: list(model.stream(TEXTS[2], max_new_tokens=4)),
        lambda: model.chat().send(TEXTS[1], IMAGES[0], max_new_tokens=3),
    ]
    with AtLine(rng.randint(1, 4000), error):
        try:
            for call in calls:
                call()
        except (KeyboardInterrupt, MemoryError, InterruptedStepError):
            pass
    model.generate("Hello!", max_new_tokens=1)  # mends what was left in the middle
    check_whole(model, backend, traffic)


# ---- what concerns one request of a batch


def check_only_one_fails(model: runtime.Model, bad: Sequence, error: type[Exception]) -> None:
    good = [model.new_sequence(model.processor.prompt(words), runtime.SamplingParams(max_new_tokens=6)) for words in TEXTS]
    wanted = [model.generate(words, max_new_tokens=6).token_ids for words in TEXTS]
    everything = [good[0], bad, *good[1:]]
    for sequence in everything:
        model.start(sequence)
    while not all(sequence.finish_reason for sequence in everything):
        model.advance()
    assert [model.output(sequence).token_ids for sequence in good] == wanted
    with pytest.raises(error):
        model.output(bad)
    for sequence in everything:
        model.end(sequence)
    assert model.engine.metrics.finished["failed"] == 1
    assert model.engine.scheduler.idle and model.engine.cache.free == SLOTS


class BadGuide:
    """Raises at its second token."""

    done = False
    tokens = 0

    def forbid(self, row: np.ndarray) -> None: ...

    def accept(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 2:
            raise DeviceError


def test_rules_that_raise(make: Callable[..., runtime.Model]) -> None:
    model = make("llava", reuse=True)
    prompt = model.processor.prompt("Hello!")
    bad = model.engine.new_sequence(prompt, runtime.SamplingParams(max_new_tokens=6), constraints=(BadGuide(),))
    check_only_one_fails(model, bad, DeviceError)


def test_text_that_raises(make: Callable[..., runtime.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llava", reuse=True)
    add_unread = text.IncrementalDetokenizer.add_unread
    bad = model.new_sequence(model.processor.prompt("Hello!"), runtime.SamplingParams(max_new_tokens=6))

    def add(answer: text.IncrementalDetokenizer, token: int) -> None:
        if answer is bad.text and len(bad.generated) == 3:
            raise DeviceError
        add_unread(answer, token)

    monkeypatch.setattr(text.IncrementalDetokenizer, "add_unread", add)
    check_only_one_fails(model, bad, DeviceError)


def test_text_that_raises_at_its_end(make: Callable[..., runtime.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine looks whether what is held back completes a stop string."""
    model = make("llava", reuse=True)
    at_end = text.IncrementalDetokenizer.stopped_at_end
    bad = model.new_sequence(model.processor.prompt("Hello!"), runtime.SamplingParams(max_new_tokens=3))

    def stopped_at_end(answer: text.IncrementalDetokenizer) -> bool:
        if answer is bad.text:
            raise DeviceError
        return at_end(answer)

    monkeypatch.setattr(text.IncrementalDetokenizer, "stopped_at_end", stopped_at_end)
    check_only_one_fails(model, bad, DeviceError)


def test_one_failing_step_of_an_async_engine(make: Callable[..., runtime.Model]) -> None:
    """Those in it fail, in their own words; those that wait, and those that come later, are answered by the same thread."""
    model = make("llava", reuse=True)
    backend = make_faulty(model, 1)

    def error() -> DeviceError:
        backend.every = None
        return DeviceError("on purpose")

    backend.error = error  # type: ignore[method-assign]
    wanted = [model.generate(words, max_new_tokens=6).text for words in TEXTS * 2]
    backend.calls = 0

    async def work() -> list[Any]:
        async with AsyncEngine(model) as engine:
            thread = engine._worker
            backend.every = 9
            results = await asyncio.gather(*(engine.generate(w, max_new_tokens=6) for w in TEXTS * 2), return_exceptions=True)
            later = await asyncio.gather(*(engine.generate(w, max_new_tokens=6) for w in TEXTS * 2))
            assert [out.text for out in later] == wanted
            assert thread.is_alive() and engine._worker is thread
            return results

    results = asyncio.run(asyncio.wait_for(work(), PATIENCE))
    failed = [result for result in results if isinstance(result, DeviceError)]
    assert 0 < len(failed) < len(results)
    assert all(isinstance(got, DeviceError) or got.text == text for got, text in zip(results, wanted, strict=True))
    assert model.engine.scheduler.idle and model.engine.cache.free == SLOTS
