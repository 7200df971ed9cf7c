"""The embedded model is a real one: compiled, it is right on drawings that it was not trained on."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.tools.development.train_tiny import Case, cases
from staticvl.tools.drawings import iou, parse_box

from .conftest import EMBEDDED

ASSETS = EMBEDDED.parent
REQUIRED = 0.95


def is_right(case: Case, out: runtime.Output) -> bool:
    """Word for word; a box when it overlaps the true one by three quarters."""
    if case.kind != "box":
        return out.text == case.answer
    said, true = parse_box(out.text), parse_box(case.answer)
    return said is not None and true is not None and iou(said, true) >= 0.75


def accuracy(artifact: Path, drawings: int) -> dict[str, float]:
    """Share of right answers by kind, in batches of every slot, greedy whatever the checkpoint's own settings say."""
    model = runtime.load(artifact)
    questions = [case for case in cases(drawings) if not case.turns]
    images = [list(case.images) for case in questions]
    outs = model.generate([case.question for case in questions], images, max_new_tokens=80, temperature=0.0)
    right: dict[str, list[bool]] = defaultdict(list)
    for case, out in zip(questions, outs, strict=True):
        right[case.kind].append(is_right(case, out))
        if case.kind != "two pictures":  # an extra, which the families with many rows to an image do not learn well
            right["all"].append(is_right(case, out))
    return {kind: sum(found) / len(found) for kind, found in right.items()}


@pytest.fixture(scope="session", params=["tiny_llava15", "tiny_llava16", "tiny_mllama"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of the trained models, compiled."""
    if request.param == EMBEDDED.name:
        return request.getfixturevalue("embedded_artifact")
    out = tmp_path_factory.mktemp(request.param) / "artifact"
    images = (2,) if request.param == "tiny_mllama" else None
    buckets = Buckets(prefill=(64,), decode=(4,), context=1024, slots=4, images=images)
    build(Options(checkpoint=ASSETS / request.param, out=out, buckets=buckets))
    return out


def test_right_on_held_out_drawings(trained: Path) -> None:
    assert accuracy(trained, 20)["all"] >= REQUIRED


@pytest.mark.slow
def test_right_on_many_held_out_drawings(trained: Path) -> None:
    found = accuracy(trained, 500)
    print({kind: round(share, 3) for kind, share in found.items()})
    questions = {"colour", "shape", "count", "position", "box"}
    assert questions <= set(found)
    assert min(found[kind] for kind in questions) >= REQUIRED
    assert found["all"] >= REQUIRED


@pytest.mark.parametrize("name", ["tiny_llava15", "tiny_llava16", "tiny_mllama"])
def test_small_enough_for_the_repository(name: str) -> None:
    folder = ASSETS / name
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 4_000_000
    assert (folder / "README.md").is_file()
