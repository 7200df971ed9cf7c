"""What can happen to a rank, and that every other one stops with an error that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from staticvl import runtime
from staticvl.runtime.artifact import Artifact, GraphSpec, open_artifact, write_manifest
from staticvl.runtime.backends.base import Group, Result
from staticvl.runtime.backends.distributed import launch, monitor, start
from staticvl.runtime.backends.distributed.leader import LeaderBackend
from staticvl.runtime.backends.distributed.world import LOOPBACK, World
from staticvl.runtime.files import sha256_file

from . import faulty_rank
from .fakes import cross_prompt, fake_artifact, image, image_prompt, oracle, run_all, text_prompt
from .rank_threads import PATIENCE, MeetingBackend, ranks_as_threads
from .test_rank_parts import DictStore

PARAMS = runtime.SamplingParams(max_new_tokens=5, ignore_eos=True)
QUESTION = "What is in the picture?"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody answers quickly here; who does not is meant not to."""
    for module in (monitor, launch):
        monkeypatch.setattr(module, "GRACE_S", 0.5)


@pytest.fixture(autouse=True, scope="module")
def unharmed(two_ranks: Path) -> Iterator[None]:
    """Whatever happens to ranks, their artifact stays as it is."""

    def digests() -> dict[str, str]:
        return {str(path): sha256_file(path) for path in sorted(two_ranks.rglob("*")) if path.is_file()}

    before = digests()
    yield
    assert digests() == before


# --- Threads, fake backends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("images", [(), (1, 2)], ids=["rows", "cross"])
def test_every_rank_is_fed_the_same(monkeypatch: pytest.MonkeyPatch, ranks: int, images: tuple[int, ...]) -> None:
    """All kinds, buckets, slots and images; each backend compares what it was fed with what the others were."""
    artifact = fake_artifact(images=images)
    if images:
        prompts = [cross_prompt(5, ((1, 2), 1), 6, 7), text_prompt(3, 4), cross_prompt(((2, 2), 2), ((1, 1), 3), 9, seed=1)]
    else:
        prompts = [image_prompt(5, image(100), 6), text_prompt(*range(3, 30)), image_prompt(image(7), image(8), 9)]
    with ranks_as_threads(monkeypatch, artifact, ranks) as (engine, others):
        sequences = [engine.add_request(prompt, PARAMS) for prompt in prompts]
        steps = run_all(engine)
        info = artifact.manifest.model
        assert [each.generated for each in sequences] == [oracle(prompt, PARAMS, info) for prompt in prompts]
        assert {step.kind for step in steps} == {"vision", "prefill", "decode"}
    assert [other.result(PATIENCE) for other in others] == [(0, False)] * (ranks - 1)


def test_what_is_loaded_and_freed_is_so_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[MeetingBackend] = []

    def make(rank: int, artifact: Artifact, group: Group) -> MeetingBackend:
        backends.append(MeetingBackend(artifact, group))
        return backends[-1]

    with ranks_as_threads(monkeypatch, fake_artifact(), 3, make=make) as (engine, others):
        graph = engine.manifest.graph("prefill", 4)
        engine.backend.unload(graph)
        engine.backend.load(graph)
        engine.unload()
    assert [other.result(PATIENCE) for other in others] == [(0, False)] * 2
    assert len(backends) == 3 and not any(backend.outputs for backend in backends)
    assert all(backend.loaded.count(graph.name) == 2 for backend in backends)


class Failing(MeetingBackend):
    """Fails, or tarries, in the third step of one rank."""

    def __init__(self, rank: int, artifact: Artifact, group: Group, whose: int, do: Callable[[], object]) -> None:
        super().__init__(artifact, group)
        self.mine, self.do, self.left = rank == whose, do, 3

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        self.left -= 1
        if self.mine and not self.left:
            self.do()
        return super().run(graph, feed, slot, image)


def fail() -> None:
    raise OverflowError("a number is too large")


@pytest.mark.parametrize("whose", [0, 1, 2])
@pytest.mark.parametrize(
    ("do", "timeout", "sentence"),
    [
        (fail, PATIENCE, "failed: OverflowError: a number is too large"),
        (lambda: time.sleep(2.0), 0.5, "kept the others waiting for more than 0.5 s; if that is normal, give a longer timeout"),
    ],
    ids=["raises", "tarries"],
)
def test_a_fault_is_told_by_all(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whose: int,
    do: Callable[[], object],
    timeout: float,
    sentence: str,
) -> None:
    def make(rank: int, artifact: Artifact, group: Group) -> Failing:
        return Failing(rank, artifact, group, whose, do)

    with ranks_as_threads(monkeypatch, fake_artifact(), 3, timeout=timeout, make=make) as (engine, others):
        engine.add_request(text_prompt(3, 4, 5), PARAMS)
        with pytest.raises(
            runtime.RankError, match=rf"^rank {whose} \(pid {os.getpid()} on .*\) {sentence}; every rank was stopped$"
        ):
            run_all(engine)
        assert [other.result(PATIENCE)[0] for other in others] == [1, 1]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2
        assert all(f"rank {whose} (pid" in line and sentence in line for line in lines)
        assert sorted(line.split(":")[1] for line in lines) == [" rank 1 stops", " rank 2 stops"]
        assert engine.scheduler.idle  # the request has ended with the step
        engine.add_request(text_prompt(3, 4, 5), PARAMS)
        with pytest.raises(runtime.RankError, match=rf"stopped earlier \(rank {whose} .*\); load the artifact again"):
            run_all(engine)


def test_a_rank_that_cannot_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MeetingBackend):
        def load(self, graph: GraphSpec) -> None:
            raise MemoryError("no room for " + graph.name)

    def make(rank: int, artifact: Artifact, group: Group) -> MeetingBackend:
        return (Broken if rank == 1 else MeetingBackend)(artifact, group)

    sentence = r"rank 1 \(pid .*\) failed: MemoryError: no room for vision-1"
    with pytest.raises(runtime.RankError, match=sentence), ranks_as_threads(monkeypatch, fake_artifact(), 2, make=make):
        pass


def test_signs_of_life_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long step is none of the control channel's business, as long as everybody answers."""

    class Slow(MeetingBackend):
        def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
            for _ in range(4):
                time.sleep(0.2)
                self.group.all_reduce(np.zeros(1, np.float32))
            return super().run(graph, feed, slot, image)

    checks = []
    check_alive = monitor.RankMonitor._check_alive
    monkeypatch.setattr(monitor.RankMonitor, "_check_alive", lambda self: (checks.append(1), check_alive(self)))

    def make(rank: int, artifact: Artifact, group: Group) -> Slow:
        return Slow(artifact, group)

    with ranks_as_threads(monkeypatch, fake_artifact(), 2, timeout=0.5, make=make) as (engine, _):
        engine.add_request(text_prompt(3, 4, 5), runtime.SamplingParams(max_new_tokens=1))
        run_all(engine)
    assert checks


def test_a_leader_that_sends_no_failure_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A stopped rank 0 does not keep a failed rank alive."""

    def make(rank: int, artifact: Artifact, group: Group) -> Failing:
        return Failing(rank, artifact, group, 1, fail)

    monkeypatch.setattr("staticvl.runtime.backends.distributed.rank_worker.GRACE_S", 0.1)
    with ranks_as_threads(monkeypatch, fake_artifact(), 2, timeout=1.0, make=make) as (engine, others):
        backend = engine.backend
        assert isinstance(backend, LeaderBackend)
        wait = backend.monitor._wait_for_call
        monkeypatch.setattr(
            backend.monitor, "_wait_for_call", lambda: wait() if backend.run_count < 3 else others[0].result(PATIENCE)
        )
        engine.add_request(text_prompt(3, 4, 5), PARAMS)
        with pytest.raises(runtime.RankError, match=r"rank 1 \(pid .*\) failed: OverflowError"):
            run_all(engine)
    sentence = capsys.readouterr().err
    assert (
        "OverflowError: a number is too large; rank 0 (pid" in sentence
        and "no failure report: it is stopped, stuck" in sentence
    )


# --- Opening ---------------------------------------------------------------------------------------------------------------


def follow_with(folder: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[int, bool]]:
    """What rank 0 says of rank 1, which opens another folder, and how rank 1 ends."""
    store: Any = DictStore()
    settings: Any = {"device": "cpu", "threads": 1, "timeout": PATIENCE}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(start.run_worker, folder, World(1, 2, 2, LOOPBACK), store, **settings)
        with pytest.raises(runtime.RankError) as caught:
            start.lead(artifact, World(0, 2, 2, LOOPBACK), store, **settings)
        return str(caught.value), other.result(PATIENCE)


def test_a_rank_with_another_artifact(two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_artifact(two_ranks)
    for name in opened.manifest.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).hardlink_to(two_ranks / name)
    write_manifest(tmp_path, msgspec.structs.replace(opened.manifest, quant="w8a16"))
    sentence, end = follow_with(tmp_path, opened, monkeypatch)
    other = open_artifact(tmp_path).manifest.digest
    assert (
        "rank 1 (pid" in sentence
        and f"digest {other[:12]} instead of {opened.manifest.digest[:12]}; copy {two_ranks}" in sentence
    )
    assert end == (1, False)


def test_a_rank_without_its_files(two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_artifact(two_ranks)
    (tmp_path / "manifest.json").hardlink_to(two_ranks / "manifest.json")
    sentence, end = follow_with(tmp_path, opened, monkeypatch)
    assert f"on {socket.gethostname()}): {tmp_path}" in sentence and "is missing; copy the whole artifact folder" in sentence
    assert end == (1, False)


def test_a_port_that_is_taken(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", LOOPBACK), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        sentence = (
            f"rank 0 cannot listen at 127.0.0.1:{port}, which another program uses; give another MASTER_PORT to all ranks"
        )
        with pytest.raises(runtime.RankError, match=sentence):
            runtime.load(two_ranks)


def test_no_port_at_all(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(runtime.RankError, match=r"rank 1 has no store at .*MASTER_PORT.*; start the ranks with torchrun"):
        runtime.load(two_ranks)


def test_a_rank_that_does_not_come_up(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ENTRY", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(runtime.RankError, match=r"rank 1 \(pid \d+\) ended before it was ready \(exit status 7\); see its own"):
        runtime.load(two_ranks)


# --- Processes -------------------------------------------------------------------------------------------------------------


def gone(pids: list[int]) -> bool:
    """Whether all processes end, soon."""
    alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], PATIENCE)[1]
    return not alive


def load_faulty(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch, timeout: float = PATIENCE) -> runtime.Model:
    monkeypatch.setattr(launch, "ENTRY", (sys.executable, faulty_rank.__file__))
    monkeypatch.setenv("FAULT", fault)
    return runtime.load(folder, timeout=timeout)


def others_of(model: runtime.Model) -> list[int]:
    backend = model.engine.backend
    assert isinstance(backend, LeaderBackend)
    return [peer.pid for peer in backend.monitor.peers.values()]


@pytest.mark.parametrize(
    ("fault", "timeout", "sentence"),
    [
        ("1 decode 7 SIGKILL", PATIENCE, "died: killed by SIGKILL"),
        ("1 decode 3 SIGSTOP", 1.0, "does not answer: it is stopped, stuck, or out of reach"),
        pytest.param("1 prefill 4 SIGKILL", PATIENCE, "died: killed by SIGKILL", marks=pytest.mark.slow),
        pytest.param("1 prefill 2 SIGSTOP", 1.0, "does not answer", marks=pytest.mark.slow),
        pytest.param("1 prefill 2 raise", PATIENCE, "failed: OverflowError: a number is too large", marks=pytest.mark.slow),
    ],
)
def test_something_happens_to_another_rank(
    two_ranks: Path, monkeypatch: pytest.MonkeyPatch, fault: str, timeout: float, sentence: str
) -> None:
    with load_faulty(two_ranks, fault, monkeypatch, timeout) as model:
        pids = others_of(model)
        with pytest.raises(runtime.RankError, match=rf"^rank 1 \(pid {pids[0]} on .*\) {sentence}.*; every rank was stopped$"):
            model.generate(QUESTION, max_new_tokens=20, ignore_eos=True)
        assert gone(pids)
        with pytest.raises(runtime.RankError, match=r"stopped earlier \(rank 1 .*load the artifact again"):
            model.generate(QUESTION)
        assert model.engine.cache.free == 4


@pytest.mark.slow
def test_a_rank_dies_while_nothing_runs(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_faulty(two_ranks, "1 decode 1000000 raise", monkeypatch) as model:
        pids = others_of(model)
        assert model.generate(QUESTION, max_new_tokens=3).token_ids
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(runtime.RankError, match=r"rank 1 \(pid .*\) died: killed by SIGKILL"):
            model.generate(QUESTION)


def start_lead(folder: Path, fault: str = "") -> tuple[subprocess.Popen[str], list[int]]:
    """Rank 0 as a process that has begun to answer, and the pids of the ranks that it has started."""
    command = [sys.executable, faulty_rank.__file__, "--lead", str(folder)]
    env = os.environ | {"FAULT": fault}
    lead = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert lead.stdout is not None
    word, *pids = lead.stdout.readline().split() or ["nothing"]
    assert word == "ready", lead.communicate(timeout=PATIENCE)
    return lead, [int(pid) for pid in pids]


@pytest.mark.parametrize("fault", ["0 prefill 4 SIGKILL", pytest.param("0 decode 7 SIGKILL", marks=pytest.mark.slow)])
def test_rank_0_is_killed(two_ranks: Path, fault: str) -> None:
    lead, pids = start_lead(two_ranks, fault)
    _, err = lead.communicate(timeout=PATIENCE)
    assert lead.returncode == -signal.SIGKILL and pids and gone(pids)
    sentence = f"staticvl: rank 1 stops: rank 0 (pid {lead.pid} on {socket.gethostname()}) died"
    assert err.splitlines() == [faulty_rank.SAID, sentence]


def test_ctrl_c_leaves_no_process(two_ranks: Path) -> None:
    lead, pids = start_lead(two_ranks)
    os.killpg(lead.pid, signal.SIGINT)  # as a terminal does
    out, err = lead.communicate(timeout=PATIENCE)
    assert not out and lead.returncode == 130 and pids and gone(pids)
    assert err.splitlines() == [faulty_rank.SAID, "interrupted"], "the other ranks end without a word"


@pytest.mark.slow
def test_a_starter_that_dies_early_leaves_no_process(two_ranks: Path) -> None:
    """Before there is a control channel to end."""
    code = (
        "import os, sys, signal\nfrom staticvl import runtime\n"
        "from staticvl.runtime.backends.distributed import control, launch\n"
        "def publish(self, store): print([p.pid for p in started], flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "started, popen = [], launch.subprocess.Popen\n"
        "launch.subprocess.Popen = lambda *a, **k: started.append(popen(*a, **k)) or started[-1]\n"
        f"control.WorkerListener.publish = publish\nruntime.load({str(two_ranks)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGKILL and gone([int(done.stdout.strip("[]\n"))])
