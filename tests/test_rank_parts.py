"""What ranks are made of, each part by itself: the protocol, links, the start, failure reports, collectives."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch.distributed import HashStore

from staticvl import runtime
from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.backends.distributed import control
from staticvl.runtime.backends.distributed.compute_thread import ComputeThread
from staticvl.runtime.backends.distributed.control import Published, WorkerListener, join
from staticvl.runtime.backends.distributed.failures import (
    Activity,
    CollectiveError,
    Peer,
    RankError,
    RankStatus,
    failure_report,
)
from staticvl.runtime.backends.distributed.group import GlooGroup
from staticvl.runtime.backends.distributed.protocol import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    Failed,
    FrameError,
    FrameKind,
    Header,
    Hello,
    Link,
    State,
    encode,
    read_header,
)
from staticvl.runtime.backends.distributed.start import _is_loopback, _plain_address, read_timeout
from staticvl.runtime.backends.distributed.world import LOOPBACK, RankInfo, World, rank_info_of, started_world

PATIENCE = 20.0  # seconds; only a broken test waits this long


class DictStore:
    """A store for threads of one process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.values[key] = value.encode()
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, PATIENCE):
                raise RuntimeError("timed out")
            return self.values[key]


# --- The protocol and links ------------------------------------------------------------------------------------------------


def test_a_header_survives_the_wire() -> None:
    header = Header(FrameKind.RUN, graph=3, slot=2, image=1, run=1 << 40, nbytes=1 << 33)
    assert len(header.packed()) == HEADER.size == 32
    assert read_header(header.packed()) == header


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: example\r\n", Header(FrameKind.RUN).packed().replace(b"\5", b"\x63")]
)
def test_other_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(FrameError, match="no message of this release of staticvl; use one release on all machines"):
        read_header(data.ljust(HEADER.size)[: HEADER.size])


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    with socket.create_server((LOOPBACK, 0)) as server:
        first = socket.create_connection(server.getsockname())
        links = Link(first, PATIENCE), Link(server.accept()[0], PATIENCE)
    yield links
    for link in links:
        link.close()


def test_what_the_system_takes_in_pieces_arrives_whole(pair: tuple[Link, Link]) -> None:
    near, far = pair
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, n).astype(np.uint8) for n in (1, 5_000_000, 3, 3_000_000)]
    header = Header(FrameKind.RUN, nbytes=sum(map(len, sent)))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(near.send, [header.packed(), *(array.data for array in sent)])
        assert far.receive_header() == header
        found = [np.empty_like(array) for array in sent]
        for array in found:
            far.receive_into(array.data)
        sending.result()
    assert all(map(np.array_equal, found, sent))


def test_a_peer_that_reads_nothing_keeps_nobody_waiting(pair: tuple[Link, Link]) -> None:
    near, _ = pair
    frame = encode(FrameKind.PING)
    near.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            near.socket.send(bytes(1 << 16))
    near.socket.settimeout(PATIENCE)
    assert not near.try_send(frame)


def test_a_peer_that_is_gone_is_offered_nothing(pair: tuple[Link, Link]) -> None:
    near, far = pair
    far.close()
    with pytest.raises(EOFError, match="closed"):
        near.receive_header()
    assert not all(near.try_send(encode(FrameKind.PING)) for _ in range(3))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"doing":"sleeping"}', "cannot be read"),
        (b'{"doing":"idle","more":1}', "cannot be read"),
        (bytes(MAX_PAYLOAD_BYTES + 1), f"announces {MAX_PAYLOAD_BYTES + 1} bytes; expected at most {MAX_PAYLOAD_BYTES}"),
    ],
)
def test_records_are_checked(pair: tuple[Link, Link], data: bytes, sentence: str) -> None:
    near, far = pair
    near.send([Header(FrameKind.STATE, nbytes=len(data)).packed(), data])
    with pytest.raises(FrameError, match=sentence):
        far.receive_payload(far.receive_header(), State)


def test_the_words_on_the_wire_stay() -> None:
    assert encode(FrameKind.STATE, State("meeting")).endswith(b'{"doing":"meeting"}')
    assert encode(FrameKind.FAILED, Failed("no memory", True)).endswith(b'{"text":"no memory","meeting":true}')


def test_a_worker_gives_results_and_errors_from_one_thread() -> None:
    worker, seen = ComputeThread("test"), []
    for call in (lambda: seen.append(threading.get_ident()), lambda: seen.append(threading.get_ident()), lambda: 1 / 0):
        worker.start(call)
        if len(seen) < 2:
            worker.finish()
    with pytest.raises(ZeroDivisionError):
        worker.finish()
    worker.start(lambda: 7)
    assert worker.finish() == 7 and not worker.busy
    assert seen[0] == seen[1] != threading.get_ident()
    worker.close(PATIENCE)


# --- The start -------------------------------------------------------------------------------------------------------------


def world(rank: int, size: int = 3) -> World:
    return World(rank, size, size, LOOPBACK)


def published(store: DictStore) -> Published:
    return msgspec.json.decode(store.get(control.KEY), type=Published)


def call(store: DictStore, data: bytes) -> socket.socket:
    """A connection to the control port that begins with these bytes."""
    sock = socket.create_connection((LOOPBACK, published(store).port), timeout=PATIENCE)
    sock.sendall(data)
    return sock


def hello(store: DictStore, rank: int, **changes: object) -> bytes:
    message = Hello(token=published(store).token, rank=rank, pid=1, host="h")
    return encode(FrameKind.HELLO, msgspec.structs.replace(message, **changes))


@pytest.fixture
def listening() -> Iterator[tuple[WorkerListener, DictStore]]:
    listener, store = WorkerListener(world(0), PATIENCE), DictStore()
    listener.publish(store)
    yield listener, store
    listener.close()
    for _, link in listener.workers.values():
        link.close()


def test_strangers_are_turned_away_and_ranks_let_in(listening: tuple[WorkerListener, DictStore]) -> None:
    listener, store = listening
    strangers = [
        call(store, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
        call(store, hello(store, 1, token="0" * 32)),
        call(store, Header(FrameKind.HELLO, nbytes=1 << 40).packed()),
        call(store, encode(FrameKind.FAILURE_REPORT, Hello("", 1, 1, "h"))),
        call(store, b"SVR1"),  # and no more
        call(store, b""),
    ]
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(join, store, world(rank), PATIENCE) for rank in (2, 1)]
        listener.wait(PATIENCE, lambda _: None)
        peers = [each.result() for each in joining]
    assert sorted(listener.workers) == [1, 2]
    assert all(peer == Peer(0, os.getpid(), socket.gethostname()) for peer, _ in peers)
    for sock in strangers:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    listener.workers[2][1].send([encode(FrameKind.PING)])
    assert peers[0][1].receive_header().kind is FrameKind.PING, "the link of rank 2 leads to rank 2"
    with pytest.raises(OSError):
        call(store, b"")


def test_a_hello_may_come_in_pieces(listening: tuple[WorkerListener, DictStore]) -> None:
    listener, store = listening
    data = hello(store, 1) + encode(FrameKind.READY)
    sock = call(store, data[:7])
    call(store, hello(store, 2))
    heard = 0

    def send_more(_: object) -> None:
        nonlocal heard
        heard += 1
        sock.sendall(data[7:] if heard == 3 else b"")

    listener.wait(PATIENCE, send_more)
    assert listener.workers[1][1].receive_header().kind is FrameKind.READY, "nothing after the hello is lost"


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ((1,), "rank 2 did not join within 0.3 s; start all 3 ranks"),
        ((), "ranks 1, 2 did not join within 0.3 s"),
        ((1, 1), r"rank 1 \(pid 1 on h\) and rank 1 \(pid 1 on h\) have the same rank; give every process its own RANK"),
        ((3,), r"rank 3 \(pid 1 on h\) is not among the 3 ranks; start all ranks with one WORLD_SIZE"),
    ],
)
def test_ranks_that_do_not_fit(listening: tuple[WorkerListener, DictStore], ranks: tuple[int, ...], sentence: str) -> None:
    listener, store = listening
    callers = [call(store, hello(store, rank)) for rank in ranks]
    with pytest.raises(RankError, match=sentence):
        listener.wait(0.3, lambda _: None)
    for caller in callers:
        caller.close()


def test_joining_where_nobody_listens(listening: tuple[WorkerListener, DictStore]) -> None:
    listener, store = listening
    listener.close()
    with pytest.raises(RankError, match=r"rank 0 \(pid \d+ on .*\) cannot be reached at 127.0.0.1, port \d+"):
        join(store, world(1), PATIENCE)


# --- Failure reports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activities", "named"),
    [
        (("lost", "lost", "died"), (2,)),
        (("meeting", "silent", "lost"), (1,)),
        (("meeting", "lost", "failed"), (2,)),
        (("lost", "computing", "meeting"), (1,)),
        (("computing", "lost", "lost"), (0,)),
        (("lost", "lost", "idle"), (0, 1)),
        (("failed", "meeting", "died"), (0, 2)),
        (("computing", "computing", "idle"), ()),
    ],
)
def test_who_is_to_blame(activities: tuple[Activity, ...], named: tuple[int, ...]) -> None:
    statuses = [RankStatus(Peer(rank, 100 + rank, "h"), activity) for rank, activity in enumerate(activities)]
    sentence = failure_report(statuses, 5)
    assert [rank for rank in range(3) if f"rank {rank} (pid {100 + rank} on h)" in sentence] == list(named)


def test_a_long_list_is_cut() -> None:
    sentence = failure_report([RankStatus(Peer(rank, rank, "h"), "failed", "no memory") for rank in range(8)], 5)
    assert sentence.count("no memory") == 3 and sentence.endswith("; and 5 more")


# --- Where this process sits -----------------------------------------------------------------------------------------------


def test_the_world_is_what_the_launcher_says() -> None:
    assert started_world({}) is started_world({"RANK": "1"}) is None
    both = {"RANK": "3", "WORLD_SIZE": "4"}
    assert started_world(both) == World(3, 4, 4, LOOPBACK)
    assert started_world(both | {"MASTER_ADDR": "node-0"}) == World(3, 4, 1, "node-0")
    spread = started_world(both | {"MASTER_ADDR": "node-0", "LOCAL_WORLD_SIZE": "2"})
    assert spread == World(3, 4, 2, "node-0") and not spread.on_one_machine


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'; expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2; expected a rank from 0 to WORLD_SIZE - 1"),
    ],
)
def test_a_world_that_makes_no_sense(env: dict[str, str], sentence: str) -> None:
    with pytest.raises(ArtifactError, match=sentence):
        started_world(env)


def test_seats_of_several_groups() -> None:
    assert [rank_info_of(rank, 2, 2) for rank in range(4)] == [
        RankInfo(0, 2, 0, 2),
        RankInfo(1, 2, 0, 2),
        RankInfo(0, 2, 1, 2),
        RankInfo(1, 2, 1, 2),
    ]


def test_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATICVL_TIMEOUT", raising=False)
    assert read_timeout(None) == 300 and read_timeout(2.5) == 2.5
    with pytest.raises(ArtifactError, match="timeout is 0; expected seconds above 0"):
        read_timeout(0)
    monkeypatch.setenv("STATICVL_TIMEOUT", "40")
    assert read_timeout(None) == 40 and read_timeout(2.5) == 2.5
    monkeypatch.setenv("STATICVL_TIMEOUT", "soon")
    with pytest.raises(ArtifactError, match="STATICVL_TIMEOUT is 'soon'; expected seconds"):
        read_timeout(None)


def test_the_address_that_other_machines_see() -> None:
    assert [_plain_address(address) for address in ("::ffff:10.0.0.7", "10.0.0.7", "fe80::1")] == [
        "10.0.0.7",
        "10.0.0.7",
        "fe80::1",
    ]
    assert [_is_loopback(address) for address in ("::ffff:127.0.0.1", "127.0.1.1", "::1", "10.0.0.7")] == [True] * 3 + [False]


# --- Collectives -----------------------------------------------------------------------------------------------------------


def members_of(seats: list[RankInfo], timeout: float) -> list[GlooGroup]:
    store = HashStore()
    with ThreadPoolExecutor(len(seats)) as pool:
        return list(pool.map(lambda rank_info: GlooGroup(store, rank_info, timeout, LOOPBACK), seats))


def test_sums_have_the_same_bits_everywhere_and_gathers_are_in_rank_order() -> None:
    groups = members_of([RankInfo(rank, 3) for rank in range(3)], PATIENCE)
    assert [(group.rank, group.size, group.in_collective) for group in groups] == [(rank, 3, False) for rank in range(3)]

    def work(group: GlooGroup) -> list[np.ndarray]:
        rng = np.random.default_rng(group.rank)
        arrays = [rng.standard_normal(shape, np.float32) for shape in ((1, 1, 7), (2, 5, 8), (1, 64, 1001))]
        found = []
        for array in arrays:
            for _ in range(2):  # what is kept from the first time serves the second
                out = np.empty((*array.shape[:-1], 3 * array.shape[-1]), np.float32)
                group.all_gather(array, out)
                assert np.array_equal(out[..., group.rank * array.shape[-1] :][..., : array.shape[-1]], array)
            found.append(out)
            group.all_reduce(array)
            found.append(array)
        return found

    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(work, groups))
    for gathered, *others in zip(*(rank[::2] for rank in ranks), strict=True):
        assert all(np.array_equal(gathered, other) for other in others)
    for place, (total, *others) in enumerate(zip(*(rank[1::2] for rank in ranks), strict=True)):
        assert all(total.tobytes() == other.tobytes() for other in others)
        parts = np.split(ranks[0][2 * place].astype(np.float64), 3, axis=-1)
        np.testing.assert_allclose(total, sum(parts), atol=1e-5)


def test_stages_do_not_sum_together_but_hand_on_by_place() -> None:
    groups = members_of([rank_info_of(rank, 2, 2) for rank in range(4)], PATIENCE)
    arrays = [np.full(3, 10.0**rank, np.float32) for rank in range(4)]

    def work(group: GlooGroup, array: np.ndarray) -> None:
        group.all_reduce(array)
        array += group.rank
        for give, take in ((group.send, group.receive), (group.receive, group.send)):
            (give if group.stage else take)(array, 1 - group.stage)
            array += 5

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, groups, arrays))
    assert [array[0] for array in arrays] == [1110, 1111, 1110, 1111]


def test_a_stage_of_one_rank() -> None:
    first, second = members_of([rank_info_of(rank, 1, 2) for rank in range(2)], PATIENCE)
    array = np.arange(4, dtype=np.float32)
    first.all_reduce(array)
    found = np.zeros_like(array)
    with ThreadPoolExecutor(1) as pool:
        giving = pool.submit(first.send, array, 1)
        second.receive(found, 0)
        giving.result()
    assert np.array_equal(found, np.arange(4))


def test_a_collective_waits_only_so_long() -> None:
    groups = members_of([RankInfo(rank, 2) for rank in range(2)], 0.2)
    with pytest.raises(CollectiveError, match=r"^Timed out waiting 200ms"):
        groups[0].all_reduce(np.zeros(4, np.float32))
    assert groups[0].in_collective, "it is not the one for whom others wait"


# --- What `load` says ------------------------------------------------------------------------------------------------------


def test_a_launcher_that_started_another_number(embedded_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = (
        r"was compiled for 1 rank \(tp=1, pp=1\), but WORLD_SIZE says that 2 were started; start it with no launcher, or load"
    )
    with pytest.raises(ArtifactError, match=sentence):
        runtime.load(embedded_artifact)
    with runtime.load(embedded_artifact, tp=1) as model:
        assert model.generate("What is in the picture?", max_new_tokens=2).token_ids


def test_a_closed_model_is_not_used(embedded_artifact: Path) -> None:
    with runtime.load(embedded_artifact) as model:
        model.generate("Hello", max_new_tokens=1)
    model.close()
    with pytest.raises(RuntimeError, match="the model was closed; load the artifact again"):
        model.generate("Hello", max_new_tokens=1)
