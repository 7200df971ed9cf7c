"""The benchmark against peers: who plays when, what ratios are made of, and one whole run on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers.__main__ import make_checkpoint
from benchmarks.peers.answers import compare
from benchmarks.peers.contestants import ANCHOR, CONTESTANTS, Contestant
from benchmarks.peers.match import Entry, Match, heats, relative
from benchmarks.peers.measures import Measure, measures, tokens
from benchmarks.peers.process import ContestantError, home_of
from benchmarks.peers.report import as_data
from benchmarks.peers.runners.base import UnsupportedError
from benchmarks.peers.sizes import QUICK
from benchmarks.peers.worker import Worker

from .conftest import REPO

ANCHORED = next(c for c in CONTESTANTS if c.name == ANCHOR)
PEER = Contestant("peer", "peer", "", 2.0, 0.5)
SPEED = Measure("speed", "tokens/s", {"do": "prefill", "tokens": [3]}, 10)
DELAY = Measure("delay", "s", {"do": "image_prompt"})


class Puppet:
    """A contestant's process that says how long it took; what it fails at is noted by name."""

    def __init__(self, name: str, seconds: list[float], calls: list[str], fails: str = "") -> None:
        self.name, self.seconds, self.calls, self.fails = name, iter(seconds), calls, fails
        self.ended = False

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.calls.append(f"{self.name} {do}")
        if do == self.fails:
            raise ContestantError("too hard")
        if do == "logits":
            np.save(arguments["file"], np.array([1.0, 2.0]))
        return {"seconds": 1.0 if do in ("open", "logits") else next(self.seconds, 1.0)}

    def pss_mb(self) -> float:
        return 5.0

    def end(self) -> None:
        self.ended = True


def played(tmp_path: Path, puppets: dict[str, Puppet], repeats: int, *wanted: Measure) -> list[Entry]:
    reference = tmp_path / "reference.npy"
    np.save(reference, np.array([1.0, 2.0]))
    entries, saved = [Entry(ANCHORED), Entry(PEER)], []
    start: Any = lambda contestant: puppets[contestant.name]  # noqa: E731
    Match(wanted, repeats, start, ([3, 4], reference), lambda _: None, lambda: saved.append(len(entries[0].seconds))).play(
        entries
    )
    assert saved == [*range(1, len(wanted) + 1), len(wanted)]
    assert all(puppet.ended for puppet in puppets.values())
    return entries


def test_turns_alternate_and_the_first_counts_for_nothing(tmp_path: Path) -> None:
    calls: list[str] = []
    puppets = {ANCHOR: Puppet(ANCHOR, [100.0, 2.0, 4.0, 3.0], calls), "peer": Puppet("peer", [100.0, 6.0, 6.0, 9.0], calls)}
    ours, theirs = played(tmp_path, puppets, 3, SPEED)
    assert [c for c in calls if c.endswith("prefill")] == [f"{ANCHOR} prefill", "peer prefill"] * 4
    assert ours.seconds == {"speed": [2.0, 4.0, 3.0]}
    assert theirs.seconds == {"speed": [6.0, 6.0, 9.0]}
    assert theirs.beside == {"speed": [2.0, 4.0, 3.0]}
    assert relative(ours, theirs, "speed") == 2.0
    figures = as_data([ours, theirs], [SPEED], {})
    assert figures["contestants"]["peer"]["figures"]["speed"] == pytest.approx(10 / 6, rel=1e-3)
    assert figures["ratios"] == {"speed": {ANCHOR: {"peer": 2.0}}}


def test_a_failing_contestant_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    calls: list[str] = []
    puppets = {ANCHOR: Puppet(ANCHOR, [], calls), "peer": Puppet("peer", [], calls, fails="prefill")}
    ours, theirs = played(tmp_path, puppets, 2, SPEED, DELAY)
    assert theirs.notes == ["speed: failed: too hard"]
    assert "speed" not in theirs.seconds
    assert len(theirs.seconds["delay"]) == len(ours.seconds["speed"]) == 2
    assert calls.count("peer prefill") == 1
    assert relative(ours, theirs, "speed") is None


def test_one_that_does_not_open_is_ended_and_left_out(tmp_path: Path) -> None:
    puppets = {ANCHOR: Puppet(ANCHOR, [], []), "peer": Puppet("peer", [], [], fails="open")}
    ours, theirs = played(tmp_path, puppets, 1, SPEED)
    assert theirs.notes == ["open: failed: too hard"]
    assert theirs.pss_mb is None and not theirs.seconds
    assert ours.pss_mb == 5.0


def test_heats_are_compared_through_the_anchor() -> None:
    """The machine was three times slower when the second peer had its turns; the anchor took three times as long too."""
    first = Entry(ANCHORED, seconds={"speed": [1.0]}, beside={"speed": [1.0]})
    later = Entry(PEER, seconds={"speed": [6.0]}, beside={"speed": [3.0]})
    assert relative(first, later, "speed") == 2.0


def test_rates_are_of_the_amount_and_delays_are_seconds() -> None:
    assert SPEED.figure(2.0) == 5.0
    assert DELAY.figure(2.0) == 2.0


def test_every_heat_fits_and_has_the_anchor() -> None:
    limit = 10.0
    alive = heats(CONTESTANTS, limit)
    assert all(heat[0].name == ANCHOR for heat in alive)
    assert all(sum(c.gigabytes for c in heat) <= limit for heat in alive)
    others = [c.name for heat in alive for c in heat[1:]]
    assert sorted([ANCHOR, *others]) == sorted(c.name for c in CONTESTANTS)
    assert len(heats(CONTESTANTS, 1000)) == 1


def test_no_two_contestants_share_what_they_make(tmp_path: Path) -> None:
    homes = [home_of(contestant, tmp_path) for contestant in CONTESTANTS]
    assert len(set(homes)) == len(CONTESTANTS)
    assert not any(home.is_relative_to(other) for home in homes for other in homes if home != other)


def test_wrong_logits_are_told_from_rounded_ones(tmp_path: Path) -> None:
    right, other = tmp_path / "right.npy", tmp_path / "other.npy"
    np.save(right, np.array([3.0, 4.0]))
    np.save(other, np.array([3.0, 4.5, 100.0]))  # an entry that only fills the vocabulary up
    assert compare(other, right, 0.11).right and compare(other, right, 0.11).same_token
    assert compare(other, right, 0.11).distance == pytest.approx(0.1)
    assert not compare(other, right, 0.09).right
    np.save(other, np.array([4.0, 3.0]))
    assert not compare(other, right, 1.0).same_token


def test_all_are_asked_the_same() -> None:
    once, again = measures(QUICK, 100, 56), measures(QUICK, 100, 56)
    assert once == again
    batch = next(m for m in once if m.name == "decode, batch 2")
    assert [len(p) for p in batch.command["prompts"]] == [QUICK.short] * QUICK.batch
    assert batch.amount == QUICK.batch
    assert max(max(p) for p in batch.command["prompts"]) < 100


def test_workers_do_all_that_is_asked_and_agree(tmp_path: Path, embedded_artifact: Path) -> None:
    """staticvl and transformers in this process, on the embedded model."""
    checkpoint = make_checkpoint(QUICK, tmp_path / "checkpoint")
    side = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]["image_size"]
    wanted = measures(QUICK, 200, side)
    for runner, setting in (("ours", "none"), ("hf", "float32")):
        worker = Worker(runner, setting, checkpoint, embedded_artifact, QUICK, threads=1)
        assert worker.open(tokens(4, 0, 200))["seconds"] > 0
        for measure in wanted:
            command = dict(measure.command)
            assert getattr(worker, command.pop("do"))(**command)["seconds"] > 0
        for image in (0, side):
            worker.logits(tokens(8, 99, 200), str(tmp_path / f"{runner}-{image}.npy"), image)
    for image in (0, side):
        assert compare(tmp_path / f"ours-{image}.npy", tmp_path / f"hf-{image}.npy", 1e-4).right
    with pytest.raises(UnsupportedError, match="w8a4 is not available; available: none"):
        Worker("ours", "w8a4", checkpoint, tmp_path / "artifact", QUICK, threads=1).prepare()


@pytest.mark.slow
def test_a_quick_run_from_beginning_to_end(tmp_path: Path) -> None:
    """staticvl and transformers, nothing else installed: a peer's environment that is missing is a note, no failure."""
    command = ["-m", "benchmarks.peers", "--quick", "--repeats", "1", "--threads", "1", "--only"]
    command += ["staticvl float32,w8a16,eager,Q4_0", "--out", str(tmp_path / "report.json"), "--work", str(tmp_path / "work")]
    command += ["--chart", str(tmp_path / "chart.svg"), "--peers-python", str(tmp_path / "nowhere")]
    done = subprocess.run([sys.executable, *command], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = data["contestants"]
    for name in ("staticvl float32", "staticvl w8a16", "transformers eager"):
        assert not found[name]["notes"]
        assert found[name]["figures"].keys() == data["units"].keys()
        assert found[name]["answer"]["right"], found[name]["answer"]
        assert found[name]["versions"] and found[name]["pss_mb"] > 1 and found[name]["load_to_first_token_s"] > 0
    assert found["staticvl float32"]["answer"]["distance"] < 1e-4 < found["staticvl w8a16"]["answer"]["distance"]
    assert found["llama.cpp Q4_0"]["notes"] == [
        f"prepare: {tmp_path / 'nowhere'} is not there; make it with `make bench-peers`"
    ]
    assert set(data["ratios"]["prefill 32"]["staticvl float32"]) == {"transformers eager"}
    assert "<svg" in (tmp_path / "chart.svg").read_text(encoding="utf-8")
