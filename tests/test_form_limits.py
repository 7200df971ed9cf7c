"""What a form may cost: its size, compiling it, and forced text; whatever it is, its request fails and nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from staticvl import runtime
from staticvl.runtime.sampling.constraints import ConstraintError, ConstraintFactory
from staticvl.runtime.sampling.form_process import FormProcess
from staticvl.runtime.sampling.params import SamplingParams

from .fakes import lent
from .servers import far_model

QUESTION = "What is in the picture?"


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    yield from lent(embedded_artifact)


def schema_grammar(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps(schema)}"


def chain(count: int) -> dict[str, Any]:
    """Lists in lists, by references."""
    links: dict[str, Any] = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(count)}
    return {"$defs": links | {str(count): {"type": "string"}}, "$ref": "#/$defs/0"}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "a" * 10_001}, "regex has 10001 characters; expected at most 10000"),
        ({"choice": [str(i) for i in range(1001)]}, "choice has 1001 texts; expected at most 1000"),
        ({"choice": ["a" * 32_768, "b"]}, "choice has 32769 characters; expected at most 32768"),
        ({"json_schema": {"const": "a" * 32_768}}, "json_schema has 32781 characters of JSON; expected at most 32768"),
        ({"json_schema": '{"const": "' + "a" * 70_000 + '"}'}, "json_schema has 70013 characters; expected at most 65536"),
        ({"json_schema": "[" * 60_000}, "json_schema is not JSON"),
    ],
)
def test_sizes(model: runtime.Model, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any], message: str) -> None:
    """Refused before anything is compiled."""
    monkeypatch.setattr(FormProcess, "problem_of", None)
    with pytest.raises(ConstraintError, match=message):
        model.generate(QUESTION, **form)


def test_a_schema_of_a_python_user_that_nests_without_end(model: runtime.Model) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConstraintError, match="json_schema is not JSON"):
        model.generate(QUESTION, json_schema=schema)


COSTLY = {
    "of processor time": schema_grammar({"type": "integer", "multipleOf": 99_999_989}),
    "of the stack": schema_grammar(chain(750)),
}


@pytest.mark.parametrize("grammar", COSTLY.values(), ids=COSTLY)
def test_a_form_that_ends_the_process_is_refused_and_the_next_one_is_not(grammar: str) -> None:
    process = FormProcess(seconds=0.5)
    good = schema_grammar({"type": "integer"})
    assert process.problem_of(good) == ""
    problem = "it takes more than 0.5 s of processor time or 1024 MiB to compile, or nests too deeply"
    assert process.problem_of(grammar) == problem
    assert process.problem_of(good) == ""
    assert "objct" in process.problem_of(schema_grammar({"type": "objct"}))


def test_one_process_for_all_forms_and_none_after_them(model: runtime.Model) -> None:
    def children() -> set[int]:
        return {each.pid for each in psutil.Process().children() if "form_check.py" in " ".join(each.cmdline())}

    model.__dict__.pop("_constraint_factory", None)  # of an earlier test
    gc.collect()
    before = children()
    assert model.generate(QUESTION, regex="ab", max_new_tokens=9).text == "ab"
    started = children() - before
    assert len(started) == 1
    assert model.generate(QUESTION, choice=("yes",), max_new_tokens=9).text == "yes"
    assert children() - before == started
    psutil.Process(*started).kill()
    psutil.Process(*started).wait()
    assert model.generate(QUESTION, choice=("no",), max_new_tokens=9).text == "no", "it is started again"
    model.__dict__.pop("_constraint_factory")
    gc.collect()
    assert children() == before


def test_several_answers_compile_one_form(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(FormProcess, "problem_of", lambda self, grammar: compiled.append(grammar) or "")
    out = model.generate(QUESTION, regex="[ab]{6}", n=4, temperature=9.0, seed=1, max_new_tokens=30)
    assert len({each.text for each in (out, *out.others)}) > 1, "each has a state of its own"
    assert len(compiled) == 1
    model.generate(QUESTION, regex="[ab]{7}", max_new_tokens=30)
    assert len(compiled) == 2


def test_forced_text_may_be_written_in_any_tokens() -> None:
    """Exactly those that what is left begins with, and never by a tokenizer, whose time would grow with its square."""
    draw = random.Random(3)
    words = {"".join(draw.choices("abé", k=draw.randint(2, 6))).encode() for _ in range(40)}
    tokens = [b"", *(bytes([i]) for i in range(256)), *sorted(words)]
    maker = ConstraintFactory(SimpleNamespace(tokens=tokens, hidden=[0]), (0,))  # type: ignore[arg-type]
    for form in ("regex", "choice", "json_schema"):
        text = "".join(draw.choices("abé", k=30))
        constraint = maker.make(SamplingParams(**{form: {"const": text} if form == "json_schema" else text}))
        left = json.dumps(text, ensure_ascii=False).encode() if form == "json_schema" else text.encode()
        constraint.accept(tokens.index(b" "))  # a blank before the answer is free
        while left:
            row = np.zeros(len(tokens), np.float32)
            constraint.forbid(row)
            allowed = np.flatnonzero(np.isfinite(row)).tolist()
            assert allowed == [i for i, token in enumerate(tokens) if token and left.startswith(token)]
            token = draw.choice(allowed)
            constraint.accept(token)
            left = left[len(tokens[token]) :]
        assert constraint.done


def test_a_long_forced_text(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    out = model.generate("x", regex="a" * 2000, max_new_tokens=2100)
    assert (out.text, out.finish_reason) == ("a" * 2000, "stop")


def test_prompts_do_not_wait_for_a_form(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, compiled = threading.Event(), threading.Event()

    def problem_of(*_: Any) -> str:
        begun.set()
        compiled.wait()
        return ""

    monkeypatch.setattr(FormProcess, "problem_of", problem_of)

    async def both() -> None:
        async with runtime.AsyncEngine(model) as engine:
            formed = asyncio.create_task(engine.generate(QUESTION, regex="ab", max_new_tokens=9))
            await asyncio.to_thread(begun.wait)
            assert (await engine.generate(QUESTION, max_new_tokens=3)).token_ids
            assert not formed.done()
            compiled.set()
            assert (await formed).text == "ab"

    asyncio.run(both())
