"""A model cut in two, as two processes: it says what the whole model says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import ArtifactError, open_artifact
from staticvl.runtime.backends.ascend import torchair_host
from staticvl.runtime.backends.distributed import group, start
from staticvl.runtime.backends.distributed.group import open_store
from staticvl.runtime.backends.distributed.launch import threads_each
from staticvl.runtime.backends.distributed.leader import LeaderBackend
from staticvl.runtime.backends.distributed.world import LOOPBACK, World, started_world

from .checkpoints import tiny_llava
from .conftest import EMBEDDED, REPO
from .fakes import Guess, loaded, noise

SHAPES = REPO / "tools" / "assets" / "shapes.png"
QUESTION = "What is in the picture?"
PATIENCE = 60.0  # seconds; only a broken test waits this long


@dataclass(frozen=True)
class Pair:
    """The model in two ranks and whole."""

    cut: runtime.Model
    whole: runtime.Model


@pytest.fixture(scope="module")
def cut(two_ranks: Path) -> Iterator[runtime.Model]:
    with runtime.load(two_ranks, tp=2, timeout=PATIENCE) as model:
        yield model
        assert model.engine.cache.free == 4 and model.engine.scheduler.idle


@pytest.fixture
def pair(cut: runtime.Model, embedded_artifact: Path) -> Pair:
    return Pair(cut, loaded(embedded_artifact))


def backend_of(model: runtime.Model) -> LeaderBackend:
    backend = model.engine.backend
    assert isinstance(backend, LeaderBackend)
    return backend


def pids(model: runtime.Model) -> list[int]:
    return [peer.pid for peer in backend_of(model).monitor.peers.values()]


def running(pid: int) -> bool:
    """Whether a process is there; one that has ended and was not waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_answer(pair: Pair) -> None:
    found, expected = (
        model.generate(QUESTION, SHAPES, max_new_tokens=24, return_logits=True) for model in (pair.cut, pair.whole)
    )
    assert found.token_ids == expected.token_ids and found.text == expected.text
    assert found.logits is not None and expected.logits is not None
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-3)
    assert found.image_tokens == 64


def test_a_batch(pair: Pair) -> None:
    """Rows with images and without, of different lengths; drawn, so that a row in another's place shows."""
    prompts = [QUESTION, "Hello", QUESTION, "Say a colour, please. Any colour will do, or two of them."]
    images = [SHAPES, None, noise(1), [noise(2), noise(3)]]
    settings = {"max_new_tokens": 16, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    found, expected = (model.generate(prompts, images, **settings) for model in (pair.cut, pair.whole))
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert len({tuple(out.token_ids) for out in found}) == 4


def test_drafts(pair: Pair) -> None:
    """Every rank verifies them: right ones and wrong ones."""
    expected = pair.whole.generate(QUESTION, SHAPES, max_new_tokens=24, ignore_eos=True)
    check_drafts(pair.cut, expected.token_ids)


def check_drafts(model: runtime.Model, truth: list[int]) -> None:
    """Drafts from the right answer, some of them wrong, however long the graphs take."""
    params = runtime.SamplingParams(max_new_tokens=len(truth), ignore_eos=True)
    sequence = model.new_sequence(model.processor.prompt(QUESTION, [SHAPES]), params)
    sequence.prompt_lookup = Guess(truth, np.random.default_rng(0))  # type: ignore[assignment]
    assert model.run([sequence])[0].token_ids == truth
    assert 0 < model.engine.metrics.accepted < model.engine.metrics.drafted


def test_a_stream(pair: Pair) -> None:
    pieces = list(pair.cut.stream(QUESTION, SHAPES, max_new_tokens=12))
    assert pieces == list(pair.whole.stream(QUESTION, SHAPES, max_new_tokens=12)) and len(pieces) > 2


def test_a_stream_that_is_left(pair: Pair) -> None:
    """The other rank has no request to forget: it only does steps."""
    stream = pair.cut.stream(QUESTION, SHAPES, max_new_tokens=12)
    next(stream)
    stream.close()
    assert pair.cut.generate("Hello", max_new_tokens=6).token_ids == pair.whole.generate("Hello", max_new_tokens=6).token_ids


def test_a_chat(pair: Pair) -> None:
    said = []
    for model in (pair.cut, pair.whole):
        with model.chat() as chat:
            turns = chat.send(QUESTION, SHAPES, max_new_tokens=16), chat.send("Which colours?", max_new_tokens=16)
            said.append([turn.token_ids for turn in turns])
    assert said[0] == said[1]


def test_rows_that_a_request_takes_over_are_copied_on_every_rank(pair: Pair) -> None:
    settings = {"max_new_tokens": 6, "ignore_eos": True, "return_logits": True, "temperature": 0.0}
    questions = [QUESTION, "Where is the circle?", "Which colours are there?"]
    alone = runtime.load(pair.whole.artifact.folder, threads=1, reuse=False)
    expected = [alone.generate(question, noise(7), **settings) for question in questions]
    before = pair.cut.engine.metrics.copies
    found = pair.cut.generate(questions, [noise(7)] * 3, **settings)
    assert pair.cut.engine.metrics.copies > before and found[1].reused_tokens > 64
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-3)  # type: ignore[arg-type]


def test_graphs_that_are_freed_are_loaded_again_by_all(pair: Pair) -> None:
    backend, expected = backend_of(pair.cut), pair.whole.generate("Hello", max_new_tokens=6).token_ids
    for graph in pair.cut.artifact.manifest.graphs:
        backend.unload(graph)
    backend.load(pair.cut.artifact.manifest.graph("prefill", 32))
    assert pair.cut.generate("Hello", max_new_tokens=6).token_ids == expected


def test_the_cache_of_this_rank(pair: Pair) -> None:
    """What is read is what was written; every rank holds its own heads."""
    backend = backend_of(pair.cut)
    before = backend.read_cache("k_cache.0", 2)
    assert before.shape[:2] == (2, pair.whole.engine.manifest.cache.kv_heads // 2)
    backend.write_cache("k_cache.0", before + 1)
    assert np.array_equal(backend.read_cache("k_cache.0", 2), before + 1)
    backend.write_cache("k_cache.0", before)


def test_a_feed_of_a_wrong_shape_is_refused_before_it_is_sent(pair: Pair) -> None:
    graph = pair.cut.artifact.manifest.graph("decode", 1)
    feed = {spec.name: np.zeros((3, 3), spec.dtype) for spec in graph.inputs}
    with pytest.raises(ValueError, match=r"decode-1: token_ids is int32 \(3, 3\); expected"):
        backend_of(pair.cut).run(graph, feed)
    assert pair.cut.generate("Hello", max_new_tokens=2).token_ids


def test_an_interrupt_leaves_the_ranks_in_step(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    local, interrupted = backend_of(pair.cut).local, []
    run = local.run

    def interrupting(*args) -> np.ndarray:
        interrupted.append(1)
        if len(interrupted) == 5:
            os.kill(os.getpid(), signal.SIGINT)  # which the main thread sees while this one computes
        return run(*args)

    monkeypatch.setattr(local, "run", interrupting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pair.cut.generate(QUESTION, SHAPES, max_new_tokens=100, ignore_eos=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 5 <= len(interrupted) < 100
    expected = pair.whole.generate(QUESTION, SHAPES, max_new_tokens=8).token_ids
    assert pair.cut.generate(QUESTION, SHAPES, max_new_tokens=8).token_ids == expected


def test_the_default_process_group_is_left_to_the_caller(cut: runtime.Model) -> None:
    import torch.distributed

    assert not torch.distributed.is_initialized()


def test_cores_are_split_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staticvl.runtime.backends.distributed.launch.usable_cores", lambda: 9)
    assert [threads_each(None, size) for size in (1, 2, 16)] == [9, 4, 1] and threads_each(3, 2) == 3


def test_another_number_is_refused(two_ranks: Path) -> None:
    with pytest.raises(
        ArtifactError, match="was compiled for tp=2, not tp=3; compile it again with --tp 3 or load it with tp=2"
    ):
        runtime.load(two_ranks, tp=3)
    with pytest.raises(ArtifactError, match="timeout is -1; expected seconds above 0"):
        runtime.load(two_ranks, timeout=-1)


def test_a_rank_needs_no_other_ranks_weights(two_ranks: Path, tmp_path: Path) -> None:
    for name in open_artifact(two_ranks).manifest.files:
        if not name.startswith("weights/rank-1/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).hardlink_to(two_ranks / name)
    (tmp_path / "manifest.json").hardlink_to(two_ranks / "manifest.json")
    assert open_artifact(tmp_path, rank=0).manifest.tp == 2
    for rank in (1, None):
        with pytest.raises(ArtifactError, match=r"rank-1/.* is missing; copy the whole artifact folder"):
            open_artifact(tmp_path, rank=rank)


def test_closing_ends_the_other_process(cut: runtime.Model) -> None:
    """The last test of this model."""
    others = pids(cut)
    assert len(others) == 1 and all(map(running, others))
    cut.close()
    assert not any(map(running, others))
    with pytest.raises(RuntimeError, match="the model was closed"):
        cut.generate("Hello")


def listeners(*processes: int) -> set[str]:
    """Addresses at which processes listen."""
    found = (psutil.Process(pid).net_connections("inet") for pid in processes)
    return {each.laddr.ip for some in found for each in some if each.status == psutil.CONN_LISTEN}


def test_ranks_of_one_machine_listen_to_it_alone(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever interface the environment names, and whoever starts the ranks: the store, the control port and gloo."""
    [outer] = [name for _, name in socket.if_nameindex() if name != "lo"][:1] or ["lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", outer)
    before = listeners(os.getpid())
    with runtime.load(two_ranks, tp=2, timeout=PATIENCE) as model:
        heard = listeners(os.getpid(), *pids(model))
    assert heard - before <= {LOOPBACK} and heard


def test_ranks_started_here_meet_in_a_private_file(two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No port, so that no other user can read, change or fill the store; nothing of it is left once all are ready."""
    opened: list[tuple[str, int, int]] = []
    original = group.file_store

    def noted(file: str, ranks: int, seconds: float) -> object:
        folder = Path(file).parent
        opened.append((file, ranks, folder.stat().st_mode & 0o777))
        return original(file, ranks, seconds)

    monkeypatch.setattr(group, "file_store", noted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(group.dist, "TCPStore")
    with runtime.load(two_ranks, tp=2, timeout=PATIENCE) as model:
        assert not list(tmp_path.glob("staticvl-ranks-*"))
        assert model.generate(QUESTION, [SHAPES], max_new_tokens=2).token_ids
    [(file, ranks, mode)] = opened
    assert file.startswith(str(tmp_path)) and (ranks, mode) == (2, 0o700)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_of_ranks_that_others_have_started(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port), ("RANK", 0), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    before = listeners(os.getpid())
    world = started_world()
    assert world is not None and world.on_one_machine
    store = open_store(world, PATIENCE)
    store.set("key", "value")
    assert listeners(os.getpid()) - before <= {LOOPBACK}
    monkeypatch.setenv("RANK", "1")
    other = open_store(World(1, 2, 2, host), PATIENCE)
    assert other.get("key") == b"value"


def test_a_start_that_fails_gives_the_port_back(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    for name, value in (("MASTER_ADDR", LOOPBACK), ("MASTER_PORT", port), ("RANK", 0), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(start, "JOIN_S", 0.1)
    for _ in range(2):
        with pytest.raises(runtime.RankError, match="rank 1 did not join"):
            runtime.load(two_ranks)


# --- Under a launcher --------------------------------------------------------------------------------------------------------


def torchrun(folder: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    command += ["-m", "staticvl.tools.cli", "generate", str(folder), "--prompt", QUESTION, "--image", str(SHAPES), "--json"]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, "--max-new-tokens", "8"], capture_output=True, text=True, env=env, timeout=PATIENCE, check=False
    )


def test_torchrun(two_ranks: Path, embedded_artifact: Path) -> None:
    done = torchrun(two_ranks, 2)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)  # one object: the other rank prints nothing
    assert answer["token_ids"] == loaded(embedded_artifact).generate(QUESTION, SHAPES, max_new_tokens=8).token_ids


@pytest.mark.slow
def test_torchrun_with_another_number(two_ranks: Path) -> None:
    done = torchrun(two_ranks, 3)
    assert done.returncode == 1 and not done.stdout
    printed_lines = [line for line in done.stderr.splitlines() if line.startswith("staticvl: ")]
    assert len(printed_lines) == 1
    assert (
        "compiled for 2 ranks (tp=2, pp=1), but WORLD_SIZE says that 3 were started; start it with torchrun" in printed_lines[0]
    )
    assert "--nproc-per-node 2 -m staticvl.tools.cli generate" in printed_lines[0]


# --- More ranks ------------------------------------------------------------------------------------------------------------

SIZES = {
    3: {"vocab": 408, "hidden": 96, "heads": 6, "kv_heads": 3, "intermediate": 96, "vision_hidden": 48, "vision_heads": 3},
    8: {"vocab": 408, "hidden": 64, "heads": 8, "kv_heads": 8, "head_dim": 8, "vision_hidden": 64, "vision_heads": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (4, 1), (8, 1), (1, 2), (2, 2)])
def test_more_ranks(tp: int, pp: int, tmp_path: Path) -> None:
    """Three sum in another way than two; with four, two hold the same keys and values; two stages share no sums."""
    checkpoint = tiny_llava(tmp_path / "checkpoint", **SIZES[tp]).folder if tp in SIZES else EMBEDDED
    buckets = Buckets(prefill=(8, 32), decode=(1, 2), vision=(1,), verify=(3,), context=256, slots=2)
    said = []
    for cut in ((1, 1), (tp, pp)):
        out = tmp_path / f"{cut[0]}x{cut[1]}"
        build(Options(checkpoint=checkpoint, out=out, tp=cut[0], pp=cut[1], buckets=buckets))
        with runtime.load(out, timeout=PATIENCE) as model:
            assert cut == (1, 1) or len(pids(model)) == tp * pp - 1
            outs = model.generate([QUESTION, "Hello"], [SHAPES, None], max_new_tokens=16, ignore_eos=True)
            said.append([out.token_ids for out in outs])
            check_drafts(model, outs[0].token_ids)
    assert said[0] == said[1]


@pytest.mark.slow
def test_the_simulator_in_two_ranks(tmp_path: Path) -> None:
    """Collectives are in the graph there, and go through the same group."""
    try:
        torchair_host.wheel_folder()
    except ArtifactError as error:
        pytest.skip(str(error))
    buckets = Buckets(prefill=(32,), decode=(1,), vision=(1,), context=128, slots=1)
    said = []
    for tp in (1, 2):
        build(Options(checkpoint=EMBEDDED, out=tmp_path / f"{tp}", tp=tp, buckets=buckets, backend="ascend", dtype="float16"))
        with runtime.load(tmp_path / f"{tp}", device="sim", timeout=PATIENCE) as model:
            said.append(model.generate(QUESTION, SHAPES, max_new_tokens=10).token_ids)
    assert said[0] == said[1]
