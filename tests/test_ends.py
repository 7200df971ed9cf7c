"""How answers end: by a token, a stop string in their text, or their length. The engine alone decides it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from staticvl.runtime.engine.engine import Engine
from staticvl.runtime.engine.request import SamplingParams, Sequence
from staticvl.runtime.engine.request_log import RequestLog, read_request_log

from .fakes import check_slots, fake_engine, loaded_with_fake, run_all, text_prompt

PROMPT = text_prompt(3, 4, 5)


@dataclass
class Text:
    """A text that a stop string ends after so many tokens, or where no token follows."""

    stops_after: int | None = None
    stops_at_end: bool = False
    tokens: list[int] = field(default_factory=list)
    ends: int = 0

    def add_unread(self, token: int) -> None:
        self.tokens.append(token)

    @property
    def stopped(self) -> bool:
        return self.stops_after is not None and len(self.tokens) >= self.stops_after

    def stopped_at_end(self) -> bool:
        self.ends += 1
        return self.stopped or self.stops_at_end


def answered(text: Text | None, **settings: Any) -> tuple[Engine, Sequence]:
    engine = fake_engine()
    sequence = engine.new_sequence(PROMPT, SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **settings}))
    engine.add(sequence, text)  # type: ignore[arg-type]
    run_all(engine)
    assert engine.metrics.finished.total() == 1 and engine.cache.free == 4
    check_slots(engine)
    return engine, sequence


def test_a_stop_string_ends_an_answer_where_it_is_complete() -> None:
    text = Text(stops_after=3)
    engine, sequence = answered(text, max_new_tokens=8)
    assert (sequence.finish_reason, len(sequence.generated)) == ("stop", 3)
    assert text.tokens == sequence.generated and text.ends == 0
    assert engine.metrics.finished == {"stop": 1}


def test_a_stop_string_that_the_end_completes_is_no_length() -> None:
    """Counted once, as what it is."""
    text = Text(stops_at_end=True)
    engine, sequence = answered(text, max_new_tokens=2)
    assert (sequence.finish_reason, len(sequence.generated), text.ends) == ("stop", 2, 1)
    assert engine.metrics.finished == {"stop": 1}


@pytest.mark.parametrize("text", [None, Text()])
def test_all_tokens_without_a_stop_string_are_a_length(text: Text | None) -> None:
    engine, sequence = answered(text, max_new_tokens=2)
    assert (sequence.finish_reason, len(sequence.generated)) == ("length", 2)
    assert engine.metrics.finished == {"length": 1}


def test_the_text_is_asked_for_its_end_only_where_the_length_is_reached() -> None:
    _, plain = answered(None, max_new_tokens=3)
    text = Text(stops_at_end=True)
    _, sequence = answered(text, max_new_tokens=8, stop_token_ids=(plain.generated[1],))
    assert sequence.finish_reason == "stop" and text.ends == 0
    assert text.tokens == sequence.generated == plain.generated[:2], "a stop token is a token of the answer"


def test_an_end_is_there_before_the_answer_is_read(embedded_artifact: Path) -> None:
    """Also in the engine's figures, however many tokens a stop string takes."""
    model = loaded_with_fake(embedded_artifact)
    whole = model.generate("x", max_new_tokens=12, temperature=2.0, seed=1, ignore_eos=True)
    middle = len(whole.text) // 2
    params = SamplingParams(
        max_new_tokens=12, temperature=2.0, seed=1, ignore_eos=True, stop=(whole.text[middle : middle + 4],)
    )
    sequence = model.new_sequence(model.processor.prompt("x"), params)
    model.start(sequence)
    before = model.engine.metrics.finished.copy()
    while not sequence.finish_reason:
        model.advance()
    assert sequence.finish_reason == "stop"
    assert model.engine.metrics.finished - before == {"stop": 1}
    assert model.output(sequence).text == whole.text[: whole.text.index(params.stop[0])].rstrip()
    model.end(sequence)
    assert sequence.text is None


def test_every_request_leaves_one_line_in_the_log(embedded_artifact: Path, tmp_path: Path) -> None:
    """However it ends: also a stream that is closed, or dropped, or whose reader fails."""
    model = loaded_with_fake(embedded_artifact)
    model.request_log = RequestLog(tmp_path / "log")
    settings: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
    model.generate("Hello", n=2, **settings)
    "".join(model.stream("Hello", **settings))
    closed = model.stream("Hello", **settings)
    next(closed)
    closed.close()
    dropped = model.stream("Hello", **settings)
    next(dropped)
    del dropped
    with pytest.raises(KeyError):
        for _ in (failed := model.stream("Hello", **settings)):
            failed.throw(KeyError())
    with model.chat() as chat:
        chat.send("Hello", **settings)
    reasons = [record.finish_reason for record in read_request_log(tmp_path / "log")]
    assert reasons == ["length"] * 3 + ["cancelled"] * 3 + ["length"]
    assert model.engine.scheduler.idle
