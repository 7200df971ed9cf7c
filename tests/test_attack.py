"""A short form of `python -m tests.attack`: some bad inputs of each kind that is quick, and that the harness sees what it is
there to see."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import pytest

from .attack import mischief, server
from .attack.kinds import KINDS
from .attack.runner import Watch, cases_of, counts_of, run_kind, table
from .conftest import REPO
from .servers import until

COUNTS = {"artifacts": 60, "manifests": 60, "checkpoints": 30, "images": 100, "templates": 80, "fields": 60, "wire": 30}


@pytest.fixture(scope="module")
def folder(embedded_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What kinds share: the tiny model's artifact is in it, so that none compiles one."""
    folder = tmp_path_factory.mktemp("attack")
    shutil.copytree(embedded_artifact, folder / "onnx")
    return folder


@pytest.mark.parametrize("name", COUNTS)
def test_bad_inputs_end_as_stated(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("STATICVL_TORCH_NPU", raising=False)  # the simulator's artifact takes longer to compile than all of this
    kind = KINDS[name]
    tally = run_kind(kind, cases_of(kind, COUNTS[name], seed=0), folder, seconds=float("inf"), most=5)
    assert not tally.failures, table([tally])
    assert tally.done == COUNTS[name]


def test_a_full_run_has_thousands_of_inputs() -> None:
    kinds = list(KINDS.values())
    assert sum(counts_of(kinds, None)) >= 5000
    assert sum(counts_of(kinds, 100)) <= 100 + len(kinds)


# --- What must be seen ------------------------------------------------------------------------------------------------


def test_what_is_not_allowed_is_seen(tmp_path: Path) -> None:
    """Every kind of ending, each in its own line of the file, with the command that runs it again; a worker that is gone is
    replaced."""
    kind = mischief.KIND
    cases = cases_of(kind, kind.count, seed=3)
    watch = Watch(tmp_path / "failures.jsonl")
    tally = run_kind(kind, cases, tmp_path, float("inf"), watch)
    watch.file.close()
    expected = [ending for _, ending in mischief.DEEDS if ending != "well"]
    lines = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert [line["ending"] for line in lines] == expected
    assert tally.done == kind.count
    assert tally.endings["well"] == 2
    assert lines[0]["again"] == "python -m tests.attack --case mischief/1 --seed 3"
    assert lines[0]["what"] == kind.make(tmp_path, cases[1].rng(), 1).what
    assert "1 x mischief: the process died: SIGABRT" in table([tally])


def test_what_is_left_in_a_server_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others are answered, there are requests; once they have gone, there is nothing but a wrong answer to find."""
    monkeypatch.setattr(server, "SETTLE_S", 0)
    body, over = json.dumps(server.request(max_tokens=300, ignore_eos=True)).encode(), threading.Event()
    with server.serving(folder, "left") as target:

        def ask() -> None:
            while not over.is_set():
                target.ask(body)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            until(lambda: target.trouble(thorough=False).startswith("leaves requests or slots"))
        finally:
            over.set()
            thread.join()
        monkeypatch.setattr(server, "SETTLE_S", 15.0)
        assert target.trouble(thorough=True) == ""
        target.answer = "another"
        assert target.trouble(thorough=True).startswith("an honest request is answered wrongly")
        target.process.kill()
        target.process.wait()
        assert target.trouble(thorough=False).startswith("the server ended")


def test_the_list_in_the_docs_names_every_kind_with_its_time() -> None:
    text = (REPO / "docs" / "server.md").read_text(encoding="utf-8")
    items = " ".join(text.split()).split(" - ")
    rows = [found.groups() for each in items if (found := re.match(r"`(\w+)`: .+ May end in: (.+)\. Within (\d+) s\.", each))]
    assert [(name, float(seconds)) for name, _, seconds in rows] == [(kind.name, kind.limit_s) for kind in KINDS.values()]
    for name, endings, _ in rows:
        own = {ending for ending in KINDS[name].endings if ending.endswith("Error")}
        assert set(re.findall(r"\w+Error", endings)) == own
