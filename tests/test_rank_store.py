"""The store by which ranks find each other where no launcher gives one: what it holds is bounded, and so is every caller."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from staticvl.runtime.backends.distributed import store as store_module
from staticvl.runtime.backends.distributed.group import RankStore, release
from staticvl.runtime.backends.distributed.store import MAX_BYTES, MAX_KEYS, MAX_VALUE_BYTES, StoreServer, send_request
from staticvl.runtime.backends.distributed.world import LOOPBACK

PATIENCE = 60.0


@pytest.fixture
def server() -> Iterator[StoreServer]:
    made = StoreServer(socket.create_server((LOOPBACK, 0)))
    yield made
    made.close()


def test_set_and_get(server: StoreServer) -> None:
    assert send_request(LOOPBACK, server.port, b"G", "key") is None
    assert send_request(LOOPBACK, server.port, b"S", "key", b"value") == b""
    assert send_request(LOOPBACK, server.port, b"G", "key") == b"value"
    assert send_request(LOOPBACK, server.port, b"S", "key", b"value") == b""  # as it is
    assert send_request(LOOPBACK, server.port, b"S", "key", b"other") is None
    assert send_request(LOOPBACK, server.port, b"D", "key") is None
    assert server.values == {b"key": b"value"}


def test_what_it_holds_is_bounded(server: StoreServer) -> None:
    assert send_request(LOOPBACK, server.port, b"S", "large", b"x" * (MAX_VALUE_BYTES + 1)) is None
    held = 0
    while server.set(b"%d" % held, b"x" * MAX_VALUE_BYTES):
        held += 1
    assert sum(map(len, server.values.values())) <= MAX_BYTES < (held + 1) * (MAX_VALUE_BYTES + 8)
    server.values.clear()
    for number in range(MAX_KEYS):
        assert server.set(b"%d" % number, b"")
    assert not server.set(b"one more", b"")


def test_a_length_without_end_takes_no_memory(server: StoreServer) -> None:
    with socket.create_connection((LOOPBACK, server.port)) as caller:
        caller.sendall(b"S" + b"\xff" * 8)
        assert caller.recv(16) == b"-\0\0\0\0"


def test_silent_callers_hold_up_nobody(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are heard at a time: each is dropped when its time is over."""
    monkeypatch.setattr(store_module, "REQUEST_S", 0.2)
    silent = [socket.create_connection((LOOPBACK, server.port)) for _ in range(2 * store_module.MAX_CLIENTS)]
    mine = RankStore(LOOPBACK, server.port, PATIENCE)  # calls again until it is heard
    mine.set("key", "value")
    assert mine.get("key") == b"value"
    for each in silent:
        each.close()


def test_gloo_meets_through_it(server: StoreServer) -> None:
    found: dict[int, torch.Tensor] = {}

    def rank(number: int) -> None:
        mine = RankStore(LOOPBACK, server.port, PATIENCE)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=PATIENCE)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", mine), number, 2, options)
        found[number] = torch.tensor([1.0 + number])
        group.allreduce([found[number]]).wait()

    ranks = [Thread(target=rank, args=(number,)) for number in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(PATIENCE)
    assert [found[number].item() for number in range(2)] == [3.0, 3.0]


def test_keys_that_never_come_and_stores_that_are_not_there(server: StoreServer) -> None:
    mine = RankStore(LOOPBACK, server.port, 0.1)
    with pytest.raises(RuntimeError, match=r"the store has no key 'nothing' after 0\.1 s"):
        mine.get("nothing")
    mine.set("key", "value")
    with pytest.raises(RuntimeError, match="the store refuses the key 'key': it has another value, or the store is full"):
        mine.set("key", b"other")
    server.close()
    with pytest.raises(RuntimeError, match=rf"nothing answers at {LOOPBACK}, port {server.port} after 0\.1 s .*refused"):
        RankStore(LOOPBACK, server.port, 0.1)


def test_rank_0_listens_until_all_have_come() -> None:
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    mine = RankStore(LOOPBACK, port, PATIENCE, StoreServer(listener))
    release(mine)
    release(mine)
    with pytest.raises(OSError, match="refused"):
        send_request(LOOPBACK, port, b"G", "key")
