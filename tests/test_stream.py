"""Answers in pieces."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from staticvl import runtime
from staticvl.runtime.engine.fit import ContextError
from staticvl.runtime.processor.prompt import PromptError

from .fakes import lent, loaded_with_fake, noise

PROMPTS = ("What is in the picture?", "Where is the circle?", "a " * 30, "日本 🙂")
LONG = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    yield from lent(embedded_artifact)


@pytest.fixture
def chatty(embedded_artifact: Path) -> runtime.Model:
    """The same over the fake backend, whose answers are any tokens there are."""
    return loaded_with_fake(embedded_artifact)


def test_pieces_joined_are_the_answer(model: runtime.Model) -> None:
    for prompt in PROMPTS:
        for images in (None, noise(1)):
            pieces = list(model.stream(prompt, images, max_new_tokens=24))
            assert "".join(pieces) == model.generate(prompt, images, max_new_tokens=24).text
            assert all(pieces)


def test_pieces_come_one_token_at_a_time(model: runtime.Model) -> None:
    before = model.engine.metrics.runs["decode"]
    stream = model.stream("What is in the picture?", noise(1), **LONG)
    next(stream)
    assert model.engine.metrics.runs["decode"] - before < 3
    assert len(list(stream)) > 3


@pytest.mark.parametrize("seed", range(5))
def test_any_tokens_in_pieces(chatty: runtime.Model, seed: int) -> None:
    """Half characters, special tokens and unknown ids; a stop string that begins in one token and ends in another."""
    settings = {"max_new_tokens": 80, "temperature": 2.0, "seed": seed, "ignore_eos": True}
    whole = chatty.generate("x", **settings)
    assert "".join(chatty.stream("x", **settings)) == whole.text
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 5]
    cut = chatty.generate("x", **settings, stop=stop)
    assert "".join(chatty.stream("x", **settings, stop=[stop])) == cut.text == whole.text[: whole.text.index(stop)].rstrip()
    assert cut.finish_reason == "stop"


def test_a_reader_who_stops_listening_frees_the_slot(model: runtime.Model) -> None:
    for _ in model.stream("What is in the picture?", noise(1), **LONG):
        break
    assert model.engine.cache.free == model.engine.cache.spec.slots
    assert model.engine.scheduler.idle


def test_closing_a_stream_frees_the_slot(model: runtime.Model) -> None:
    stream = model.stream("Where is the circle?", **LONG)
    next(stream)
    assert model.engine.cache.free == model.engine.cache.spec.slots - 1
    stream.close()  # type: ignore[attr-defined]
    assert model.engine.cache.free == model.engine.cache.spec.slots


def test_an_error_in_the_reader_frees_the_slot(model: runtime.Model) -> None:
    def read() -> None:
        for piece in model.stream("Where is the circle?", **LONG):
            raise KeyError(piece)

    with pytest.raises(KeyError):
        read()
    gc.collect()  # the traceback holds the stream
    assert model.engine.cache.free == model.engine.cache.spec.slots


def test_a_stream_that_nobody_starts_holds_nothing(model: runtime.Model) -> None:
    stream = model.stream("Where is the circle?", **LONG)
    assert model.engine.scheduler.idle
    assert model.generate("Where is the circle?", **LONG).text == "".join(stream)


def test_streams_side_by_side(model: runtime.Model) -> None:
    """More of them than slots, read in turns: nobody's pieces go to anybody else."""
    requests = [(prompt, images) for prompt in PROMPTS[:3] for images in (None, noise(2))]
    alone = [model.generate(prompt, images, **LONG).text for prompt, images in requests]
    streams = [model.stream(prompt, images, **LONG) for prompt, images in requests]
    rounds = zip_longest(*streams, fillvalue="")
    assert ["".join(pieces) for pieces in zip(*rounds, strict=True)] == alone


def test_other_requests_between_two_pieces(model: runtime.Model) -> None:
    whole = model.generate("Where is the circle?", **LONG).text
    stream = model.stream("Where is the circle?", **LONG)
    first = next(stream)
    others = model.generate(list(PROMPTS), **LONG)
    assert [out.text for out in others] == [model.generate(prompt, **LONG).text for prompt in PROMPTS]
    assert first + "".join(stream) == whole


def test_a_stop_string_ends_a_stream_that_others_push_on(model: runtime.Model) -> None:
    settings = {**LONG, "stop": ("picture",)}
    stream = model.stream("Hello", **settings)
    first = next(stream)
    model.generate("Where is the circle?", **LONG)
    assert first + "".join(stream) == model.generate("Hello", **settings).text


def test_errors_come_before_the_first_piece(model: runtime.Model) -> None:
    with pytest.raises(PromptError, match="2 <image> marks but 1 image was given"):
        model.stream("<image> and <image>?", [noise(1)])
    with pytest.raises(ContextError):
        model.stream("Hello", max_new_tokens=600)
    with pytest.raises(TypeError, match="unknown settings beams"):
        model.stream("Hello", beams=4)
