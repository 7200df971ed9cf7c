"""Advice in an error can be followed: what it names is accepted, and does what it promises."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from staticvl import runtime
from staticvl.compiler.plan import Buckets, Options, PlanError, make_plan
from staticvl.model_defs.config import read_config
from staticvl.runtime.engine.fit import ContextError, check_draft
from staticvl.runtime.processor.prompt import Prompt
from staticvl.runtime.sampling.params import SamplingParams
from staticvl.tools.cli import main
from staticvl.tools.tuning.choose import choose
from staticvl.tools.tuning.costs import parse_costs
from staticvl.tools.tuning.limits import Limits
from staticvl.tools.tuning.target import Target, from_artifact
from staticvl.tools.tuning.trace_error import TraceError
from staticvl.tools.tuning.workload import Workload

from .conftest import EMBEDDED
from .fakes import fake_model

BUCKETS = Buckets(prefill=(8, 32), decode=(1,), vision=(1,), context=64, slots=1)
MOST = read_config(EMBEDDED).text.max_positions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    return fake_model(EMBEDDED, tmp_path_factory.mktemp("advice"), BUCKETS)


@pytest.fixture(scope="module")
def largest(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    """Compiled for all positions of the model."""
    return fake_model(EMBEDDED, tmp_path_factory.mktemp("largest"), replace(BUCKETS, context=MOST))


def prompt_of(length: int) -> Prompt:
    ids, none = np.full(length, 5, np.int32), np.zeros(length, np.int32)
    pixels = np.empty((0, 8, 8, 3), np.uint8)
    return Prompt(token_ids=ids, rows=none - 1, pixels=pixels, frames=(), image_tokens=0, state=none)


def refusal(model: runtime.Model, length: int, new: int) -> str:
    with pytest.raises(ContextError) as caught:
        model.engine.new_sequence(prompt_of(length), SamplingParams(max_new_tokens=new))
    return str(caught.value)


@pytest.mark.parametrize("length", [1, 40, 63, 64, 65, 500, MOST - 1, MOST, MOST + 1, 15134])
@pytest.mark.parametrize("new", [1, 64, 1000])
def test_longer_contexts(model: runtime.Model, largest: runtime.Model, length: int, new: int) -> None:
    for each in (model, largest):
        context = each.artifact.manifest.cache.context
        if length + new <= context:
            continue
        message = refusal(each, length, new)
        promised = [int(n) for n in re.findall(r"at most (\d+) new tokens", message)]
        if compiled := re.search(r"--context (\d+)", message):
            larger = int(compiled[1])
            options = Options(checkpoint=EMBEDDED, out=Path("a"), buckets=replace(BUCKETS, context=larger))
            assert make_plan(read_config(EMBEDDED), options).cache.context == larger > context
            assert length + new <= larger or length + promised[-1] == larger == MOST
        if length < context:
            each.engine.new_sequence(prompt_of(length), SamplingParams(max_new_tokens=promised[0]))
        else:
            assert "give a shorter prompt" in message
        if length >= MOST or context == MOST:
            assert not compiled and message.endswith(f"the model has {MOST} positions")


def test_an_artifact_of_before_says_nothing_of_positions(model: runtime.Model) -> None:
    """It still says how to compile a larger one."""
    engine = model.engine
    kept = engine.manifest
    info = msgspec.structs.replace(kept.model, max_positions=msgspec.UNSET)
    engine.manifest = msgspec.structs.replace(kept, model=info)
    try:
        assert "--context 15135" in refusal(model, 15134, 1)
    finally:
        engine.manifest = kept


@pytest.mark.parametrize("wanted", [-1, 1, 63, 64, 1000])
def test_drafts(model: runtime.Model, wanted: int) -> None:
    with pytest.raises(ValueError, match=f"speculate is {wanted}, but the artifact verifies at most 0") as caught:
        check_draft(model.engine.manifest, wanted)
    advised = re.search(r"--speculate (\d+)", str(caught.value))
    assert bool(advised) == (0 < wanted < 64)
    if advised:
        options = Options(checkpoint=EMBEDDED, out=Path("a"), buckets=replace(BUCKETS, verify=(wanted + 1,)))
        make_plan(read_config(EMBEDDED), options)


@pytest.mark.parametrize("bucket", [65, MOST, MOST + 1])
def test_prefill_buckets(bucket: int) -> None:
    config = read_config(EMBEDDED)
    with pytest.raises(PlanError, match=f"prefill bucket {bucket} exceeds the context 64; use smaller buckets") as caught:
        make_plan(config, Options(checkpoint=EMBEDDED, out=Path("a"), buckets=replace(BUCKETS, prefill=(bucket,))))
    advised = re.search(r"--context (\d+)", str(caught.value))
    assert bool(advised) == (bucket <= MOST)
    if advised:
        wider = replace(BUCKETS, prefill=(bucket,), context=int(advised[1]))
        make_plan(config, Options(checkpoint=EMBEDDED, out=Path("a"), buckets=wider))


@pytest.mark.parametrize(("context", "most", "larger"), [(10, None, True), (10, 20, True), (20, 20, False), (None, 20, False)])
def test_requests_that_are_too_long(context: int | None, most: int | None, larger: bool) -> None:
    table = parse_costs({"prefill": {16: 1}, "decode": {1: 1}, "vision": {1: 1}}, "costs.yaml")
    target = Target(name="x", costs=lambda context, slots: table, max_positions=most)
    limits = Limits(context=context)
    with pytest.raises(TraceError, match=f"all 3 requests are longer than the context of {context or most} tokens") as caught:
        choose(Workload(dropped=3), target, limits)
    assert ("give a larger --context" in str(caught.value)) == larger
    assert ("give shorter requests" in str(caught.value)) != larger


def test_buckets_for_an_artifact_are_bounded_by_its_model(embedded_artifact: Path) -> None:
    assert from_artifact(embedded_artifact, None, 0.0, 0, None).max_positions == MOST


def test_a_plan_needs_no_folder_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(EMBEDDED), "--plan-only"]) == 0
    alone = capsys.readouterr().out
    assert "prefill" in alone and "cache" in alone
    assert main(["compile", str(EMBEDDED), "--plan-only", "--out", "a"]) == 0
    assert capsys.readouterr().out == alone
    assert not Path("ARTIFACT").exists()
