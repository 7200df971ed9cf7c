"""Bias, penalties, bans and given forms, against their definitions one token at a time."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from staticvl import runtime
from staticvl.runtime.engine.request import SamplingParams
from staticvl.runtime.processor.token_bytes import BadWords, TokenBytes
from staticvl.runtime.processor.tokenizer import read_vocabulary
from staticvl.runtime.processor.vocabularies import Vocabulary
from staticvl.runtime.sampling.constraints import ConstraintError
from staticvl.runtime.sampling.logits_processors import LogitsProcessors, logits_processors_for

from .checkpoints_mllama import tiny_mllama
from .fakes import EOS, VOCAB, fake_engine, image, image_prompt, lent, loaded_with_fake, run_all, text_prompt
from .tiny_families import GOLDEN_QWEN

QUESTION = "What is in the picture?"


@pytest.fixture
def model(embedded_artifact: Path) -> Iterator[runtime.Model]:
    yield from lent(embedded_artifact)


# --- Bias and penalties ------------------------------------------------------------------------------------------------

ROW = np.linspace(-3, 5, 8, dtype=np.float32)


def changed(params: SamplingParams, prompt: tuple[int, ...], answer: tuple[int, ...], ends: tuple[int, ...] = ()) -> np.ndarray:
    rules = logits_processors_for(params, text_prompt(*prompt), ends, len(ROW), ())
    assert rules is not None
    for token in answer:
        rules.accept(token)
    before = ROW.copy()
    result = rules.applied(ROW)
    np.testing.assert_array_equal(ROW, before)
    return result


@given(
    prompt=st.lists(st.integers(0, 7), min_size=1, max_size=5).map(tuple),
    answer=st.lists(st.integers(0, 7), max_size=6).map(tuple),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-1.0, 0.0, 0.4]),
    frequency=st.sampled_from([-0.3, 0.0, 0.25]),
    bias=st.dictionaries(st.integers(0, 7), st.floats(-9, 9, width=32), max_size=3),
    least=st.integers(0, 4),
)
def test_each_logit_by_its_definition(
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    least: int,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={**bias, 0: 1.0},
        min_new_tokens=least,
    )
    for token, value in enumerate(changed(params, prompt, answer, ends=(3, 6))):
        logit = float(ROW[token]) + params.logit_bias.get(token, 0.0)
        if token in prompt or token in answer:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * answer.count(token) + presence * (token in answer)
        if len(answer) < least and token in (3, 6):
            logit = -np.inf
        assert value == pytest.approx(logit, rel=1e-5, abs=1e-5)


def test_nothing_asked_for_is_nothing_done() -> None:
    assert logits_processors_for(SamplingParams(), text_prompt(1), (), 8, ()) is None


def test_ids_at_a_images_positions_are_not_repeated() -> None:
    rules = LogitsProcessors(SamplingParams(repetition_penalty=2.0), image_prompt(5, image(9), 6), (), VOCAB, ())
    assert rules.seen.tolist() == [5, 6]


def test_tokens_that_the_model_does_not_have() -> None:
    engine = fake_engine()
    for named in ({"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (VOCAB,)}):
        params = SamplingParams(max_new_tokens=2, **named)
        with pytest.raises(ValueError, match="token 97 is named in logit_bias or stop_token_ids; the model has 97 tokens"):
            engine.add_request(text_prompt(1), params)


def test_stop_tokens_and_the_least_number_of_tokens() -> None:
    """The end token answers 1 at once; the forced way round takes the next best, which is token 0."""
    engine = fake_engine()
    stopped = engine.add_request(text_prompt(5, 7), SamplingParams(max_new_tokens=5, stop_token_ids=(91,), ignore_eos=True))
    later = engine.add_request(text_prompt(EOS - 1), SamplingParams(max_new_tokens=3, min_new_tokens=2))
    forced = engine.add_request(text_prompt(5, 7), SamplingParams(max_new_tokens=5, stop_token_ids=(22,), min_new_tokens=1))
    run_all(engine)
    assert (stopped.generated, stopped.finish_reason) == ([22, 91], "stop")
    assert later.generated[0] == 0 and len(later.generated) >= 2
    assert forced.generated[0] == 0


# --- Several answers, logarithms ---------------------------------------------------------------------------------------


def test_several_answers(model: runtime.Model) -> None:
    """The first is that of one alone, the others are draws of their own and do not depend on how many there are."""
    settings = {"temperature": 4.0, "seed": 7, "max_new_tokens": 8, "ignore_eos": True}
    out = model.generate(QUESTION, n=4, **settings)
    assert out.token_ids == model.generate(QUESTION, **settings).token_ids
    assert len({tuple(each.token_ids) for each in (out, *out.others)}) == 4
    fewer = model.generate([QUESTION, "Hello!"], n=2, **settings)
    assert [len(each.others) for each in fewer] == [1, 1]
    assert fewer[0].others[0].token_ids == out.others[0].token_ids
    with pytest.raises(ValueError, match="n is 2; a stream or a chat's turn has one answer"):
        model.stream(QUESTION, n=2)
    with model.chat() as chat, pytest.raises(ValueError, match="n is 2"):
        chat.send(QUESTION, n=2)


def test_logprobs_are_those_of_the_logits(model: runtime.Model) -> None:
    out = model.generate(QUESTION, max_new_tokens=5, logprobs=3, return_logits=True, temperature=0.0, frequency_penalty=2.0)
    assert out.logits is not None and out.logprobs is not None
    assert [each.token_id for each in out.logprobs] == out.token_ids
    for row, each in zip(out.logits.astype(np.float64), out.logprobs, strict=True):
        wanted = row - np.log(np.exp(row).sum())
        assert each.logprob == pytest.approx(wanted[each.token_id])
        assert [token for token, _ in each.top] == np.argsort(-wanted)[:3].tolist()
        assert [value for _, value in each.top] == pytest.approx(np.sort(wanted)[::-1][:3].tolist())
    assert model.generate(QUESTION, max_new_tokens=2).logprobs is None
    none = model.generate(QUESTION, max_new_tokens=2, logprobs=0).logprobs
    assert none is not None and [each.top for each in none] == [(), ()]


# --- Bytes of tokens ---------------------------------------------------------------------------------------------------

TEXTS = ("What is 3 + 4?", "日本 🙂 é", 'a  b\n\n{"x": [1, 2]}', "<ref>a</ref> b")


def vocabularies(folder: Path) -> Iterator[Vocabulary]:
    yield read_vocabulary(Path(__file__).parent.parent / "tools" / "assets" / "tiny_llava15" / "tokenizer.json")
    yield from (read_vocabulary(path) for path in sorted(folder.rglob("tokenizer.json")))


def check_bytes(vocabulary: Vocabulary) -> None:
    for text in TEXTS:
        ids = vocabulary.encode(text)
        written = b"".join(vocabulary.token_bytes(i) for i in ids).decode()
        assert written.removeprefix(" ") == text.removeprefix(" ")


def test_bytes_of_tokens_join_to_the_text(tmp_path: Path, model: runtime.Model) -> None:
    """Of sentencepiece's form, of byte letters, and of tiktoken files."""
    tiny_mllama(tmp_path / "mllama")
    found = list(vocabularies(tmp_path))
    assert len(found) == 2
    for vocabulary in (*found, model.processor.tokenizer.vocabulary):
        check_bytes(vocabulary)


def test_bytes_of_tiktoken_tokens(tmp_path: Path) -> None:
    from staticvl.compiler.plan import Buckets

    from .fakes import fake_model

    qwen = fake_model(GOLDEN_QWEN, tmp_path / "qwen", Buckets(prefill=(8,), decode=(1,), context=64, slots=1))
    check_bytes(qwen.processor.tokenizer.vocabulary)


# --- Bad words ---------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of a few tokens, some of several letters."""

    written = ("</s>", "a", "b", "ab", "ba", "aab", "c")

    class config:  # noqa: N801
        used = 7

    @property
    def vocabulary(self):
        return self

    def is_special(self, token: int) -> bool:
        return token == 0

    def token(self, token: int) -> str:
        return self.written[token]

    def token_bytes(self, token: int) -> bytes:
        return self.written[token].encode()


@hypothesis_settings(max_examples=200)
@given(
    words=st.lists(st.text("abcs", min_size=1, max_size=4), min_size=1, max_size=3),
    tokens=st.lists(st.integers(1, 6), max_size=8),
)
def test_exactly_the_tokens_that_complete_a_bad_word_are_forbidden(words: list[str], tokens: list[int]) -> None:
    constraint = BadWords(tuple(words), TokenBytes(Letters()))  # type: ignore[arg-type]
    text = ""
    for token in tokens:
        row = np.zeros(7, np.float32)
        constraint.forbid(row)
        for each, written in enumerate(Letters.written):
            completes = each > 0 and any(word in text + written for word in words)
            assert np.isneginf(row[each]) == completes
        if np.isneginf(row[token]):
            return
        constraint.accept(token)
        text += Letters.written[token]


def test_bad_words_are_in_no_answer(embedded_artifact: Path) -> None:
    """The fake backend answers any tokens; a text is found whatever tokens write it."""
    chatty = loaded_with_fake(embedded_artifact)
    settings = {"max_new_tokens": 60, "temperature": 3.0, "top_k": 0, "seed": 3, "ignore_eos": True}
    whole = chatty.generate("x", **settings).text
    letters = re.findall(r"[a-z]{2}", whole)[:2]
    assert letters
    out = chatty.generate("x", **settings, bad_words=[*letters, "e"])
    assert len(out.token_ids) == 60
    assert not [word for word in (*letters, "e") if word in out.text]


# --- Given forms -------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sides": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "sides"],
    "additionalProperties": False,
}


def test_answers_of_a_schema(embedded_artifact: Path) -> None:
    """Whatever the model would say: the fake backend's tokens are arbitrary, and drawn at any temperature."""
    chatty = loaded_with_fake(embedded_artifact)
    for seed in range(4):
        form = SCHEMA if seed % 2 else json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})
        out = chatty.generate("x", json_schema=form, temperature=5.0, seed=seed, max_new_tokens=200)
        if seed % 2 and out.finish_reason == "length":  # blanks between the parts are free
            continue
        assert out.finish_reason == "stop"
        answer = json.loads(out.text)
        assert set(answer) == {"colour", "sides"} and answer["colour"] in ("red", "blue") and 0 <= answer["sides"] <= 9


def test_answers_of_an_expression_and_of_choices(model: runtime.Model) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 2.0, "seed": 1}):
        out = model.generate(QUESTION, regex=r"[a-z]{3} (\d{2}|é)/x", max_new_tokens=40, **settings)
        assert re.fullmatch(r"[a-z]{3} (\d{2}|é)/x", out.text) and out.finish_reason == "stop"
        chosen = model.generate(QUESTION, choice=("a red square", 'a "blue" circle', "日本"), max_new_tokens=40, **settings)
        assert chosen.text in ("a red square", 'a "blue" circle', "日本") and chosen.finish_reason == "stop"


def test_rows_beside_a_constrained_one_are_free(model: runtime.Model) -> None:
    free = model.generate(QUESTION, max_new_tokens=12, temperature=0.0)
    sequences = [
        model.new_sequence(model.processor.prompt(QUESTION), SamplingParams(max_new_tokens=12, temperature=0.0, **form))
        for form in ({}, {"choice": ("yes", "no")}, {})
    ]
    outs = model.run(sequences)
    assert [out.token_ids for out in outs[::2]] == [free.token_ids] * 2
    assert outs[1].text in ("yes", "no")


def test_a_form_that_leaves_nothing_ends_the_answer(model: runtime.Model) -> None:
    """Where a form and a ban contradict each other."""
    out = model.generate(QUESTION, choice=("yes",), bad_words=("s",), max_new_tokens=9)
    assert out.finish_reason == "dead_end"
    assert "yes".startswith(out.text)
    assert "".join(model.stream(QUESTION, choice=("yes",), bad_words=("s",), max_new_tokens=9)) == out.text


def test_a_form_too_large_to_follow_ends_its_answer_alone(model: runtime.Model, caplog: pytest.LogCaptureFixture) -> None:
    """Which shows only when the answer has begun; those beside it go on."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "(a|b)*c{1,50}"} for i in range(560)}}
    prompt = model.processor.prompt(QUESTION)
    free = model.generate(QUESTION, max_new_tokens=12, temperature=0.0)
    forms: tuple[dict, ...] = ({"json_schema": schema}, {})
    outs = model.run([model.new_sequence(prompt, SamplingParams(max_new_tokens=12, temperature=0.0, **form)) for form in forms])
    assert outs[0].finish_reason == "dead_end"
    assert outs[0].text == "{"
    assert outs[1].token_ids == free.token_ids
    assert "cannot be followed" in caplog.text


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "a(b"}, "regex cannot be used: .*unclosed group"),
        ({"json_schema": {"type": "objct"}}, "json_schema cannot be used: .*objct"),
        ({"json_schema": "{"}, r"json_schema is not JSON \(.*\); expected a JSON schema as text or as a dict"),
    ],
)
def test_unusable_forms(model: runtime.Model, form: dict, message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        model.generate(QUESTION, **form)


def test_without_the_library(model: runtime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model.__dict__.pop("_constraint_factory", None)
    with pytest.raises(
        ConstraintError, match=r"need the package llguidance; install it with: pip install 'staticvl\[constrain\]'"
    ):
        model.generate(QUESTION, choice=("a", "b"))
    assert model.generate(QUESTION, max_new_tokens=2).text


def test_special_tokens_are_in_no_form(model: runtime.Model) -> None:
    """Not even where any text may stand."""
    out = model.generate(QUESTION, regex="(.|\n){30,40}", temperature=50.0, seed=2, max_new_tokens=60)
    hidden = set(model.processor.token_bytes.hidden)
    assert len(hidden) > 1
    assert not hidden & set(out.token_ids[:-1])
