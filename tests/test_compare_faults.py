"""Faults seeded on purpose, each found and named by the comparison without a hint of where to look."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from staticvl.compiler.build import build
from staticvl.compiler.plan import Options
from staticvl.tools.comparing.open_side import open_side
from staticvl.tools.comparing.result import ComparisonResult

from .ascend import CHECKPOINTS
from .compare_faults.catalogue import FAULTS
from .compare_faults.fault import Base, Bases, Fault, named, run
from .comparisons import BUCKETS, check_healthy, compared, samples_of
from .packings import FORMS, pack_checkpoint
from .seeded import weight


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bases]:
    with ExitStack() as stack:
        yield Bases(tmp_path_factory.mktemp("bases"), stack)


@pytest.mark.parametrize(
    "fault", [pytest.param(each, id=each.key, marks=() if each.quick else pytest.mark.slow) for each in FAULTS]
)
def test_a_seeded_fault_is_named(fault: Fault, bases: Bases, tmp_path: Path) -> None:
    result, _ = run(fault, bases, tmp_path)
    assert named(fault, result) == ""
    assert _follows_stages(result)


def _follows_stages(result: ComparisonResult) -> bool:
    """Wrong inputs and feeds suppress what follows from them."""
    stages = {each.stage for each in result.findings}
    return "definition" not in stages or not stages & {"inputs", "feeds"}


def test_there_are_many_faults_and_a_short_form() -> None:
    assert len(FAULTS) >= 60 and len({each.key for each in FAULTS}) == len(FAULTS)
    assert 6 <= sum(each.quick for each in FAULTS) <= 10


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(Base(family, quant=quant), marks=() if (family, quant) == ("qwen_vl", "w4a16-g32") else pytest.mark.slow)
        for family in ("llava", "llava_next", "mllama", "qwen_vl")
        for quant in ("none", "w8a16", "w8a8", "w8a8+vision", "w4a16", "w4a16-g32")
    ],
    ids=str,
)
def test_healthy_artifacts_raise_no_alarm(base: Base, bases: Bases) -> None:
    check_healthy(bases.reference(base), bases.artifact(base), base.family)


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["w4a16-g32", "w8a8", "w8a8+vision"])
@pytest.mark.parametrize("family", ["llava", "mllama", "qwen_vl"])
def test_healthy_calibrated_artifacts_raise_no_alarm(family: str, quant: str, bases: Bases) -> None:
    base = Base(family, quant=quant, calibrated=True)
    check_healthy(bases.reference(base), bases.artifact(base), family, layers=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["awq", "gptq-asym", "gptq-row", "w8a16-row-asym", "w8a8"])
def test_healthy_packed_checkpoints_raise_no_alarm(form: str, tmp_path: Path) -> None:
    """Numbers that both sides store are equal; a scale that differs by a thousandth is named."""
    folder = shutil.copytree(CHECKPOINTS["llava"], tmp_path / "checkpoint")
    pack_checkpoint(folder, FORMS[form])
    build(Options(checkpoint=folder, out=tmp_path / "artifact", buckets=BUCKETS["llava"]))
    reference = open_side(folder, by="eager", like=tmp_path / "artifact")
    settings = {"with_edges": False, "inspect": "never"}
    result = compared(reference, tmp_path / "artifact", samples_of("llava")[:1], **settings)
    assert not result.findings, result.findings
    scales = weight(tmp_path / "artifact", "text.layers.1.mlp.down.scales")
    scales[:1] *= 1.001
    scales.flush()
    result = compared(reference, tmp_path / "artifact", samples_of("llava")[:1], **settings)
    reference.close()
    assert [each.where for each in result.findings] == ["text.layers.1.mlp.down.weight"]
    assert re.search(r"row 0, block 0.* 1\.001\d* times", result.findings[0].text), result.findings[0].text
