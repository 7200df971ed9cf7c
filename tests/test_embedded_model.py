"""The embedded model is a real one: compiled, it is right on drawings that it was not trained on."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from staticvl import runtime
from staticvl.tools.drawings import iou, parse_box
from staticvl.tools.train_tiny import Case, cases

from .conftest import EMBEDDED

REQUIRED = 0.95


def is_right(case: Case, out: runtime.Output) -> bool:
    """Word for word; a box when it overlaps the true one by three quarters."""
    if case.kind != "box":
        return out.text == case.answer
    said, true = parse_box(out.text), parse_box(case.answer)
    return said is not None and true is not None and iou(said, true) >= 0.75


def accuracy(artifact: Path, drawings: int) -> dict[str, float]:
    """Share of right answers by kind, in batches of every slot."""
    model = runtime.load(artifact)
    asked = [case for case in cases(drawings) if not case.turns]
    outs = model.generate([case.question for case in asked], [list(case.pictures) for case in asked], max_new_tokens=80)
    right: dict[str, list[bool]] = defaultdict(list)
    for case, out in zip(asked, outs, strict=True):
        right[case.kind].append(is_right(case, out))
        right["all"].append(is_right(case, out))
    return {kind: sum(found) / len(found) for kind, found in right.items()}


def test_right_on_held_out_drawings(embedded_artifact: Path) -> None:
    assert accuracy(embedded_artifact, 40)["all"] >= REQUIRED


@pytest.mark.slow
def test_right_on_many_held_out_drawings(embedded_artifact: Path) -> None:
    found = accuracy(embedded_artifact, 500)
    print({kind: round(share, 3) for kind, share in found.items()})
    asked = {"colour", "shape", "count", "position", "box"}
    assert asked <= set(found)
    assert min(found[kind] for kind in asked) >= REQUIRED
    assert found["all"] >= REQUIRED


def test_small_enough_for_the_repository() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*")) <= 4 << 20
    assert (EMBEDDED / "README.md").is_file()
