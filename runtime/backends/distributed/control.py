"""The control channel: a star of TCP connections with rank 0 in the middle, kept as long as the ranks live.

Rank 0 listens on any free port and publishes it, with a random token, in the store through which ranks find each other.
Whoever connects and does not say the token is turned away. The end of a connection is how a rank learns, at once and without
asking, that the process at its other end is gone.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from .failures import Peer, RankError
from .protocol import HEADER, FrameError, FrameKind, FramePayload, Hello, Link, decode, encode, read_header
from .world import LOOPBACK, World

log = logging.getLogger(__name__)
KEY = "control"
LARGEST_HELLO = 1024
HELLO_S = 10.0  # for a stranger to say something


class Store(Protocol):
    """What is used of a torch store."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Published(FramePayload, frozen=True):
    """Where rank 0 listens; no host: on the machine that all ranks were told of."""

    host: str
    port: int
    token: str
    pid: int
    machine: str


class Members:
    """Rank 0's end before the start: the door through which the other ranks come."""

    def __init__(self, world: World, limit: float) -> None:
        """`limit`: see Link."""
        self.world, self.limit = world, limit
        self.token = secrets.token_hex(16)
        self.listener = _listen(here=world.together)
        self.listener.setblocking(False)
        self.joined: dict[int, tuple[Peer, Link]] = {}

    def publish(self, store: Store) -> None:
        host = LOOPBACK if self.world.together else ""
        port = self.listener.getsockname()[1]
        record = Published(host, port, self.token, os.getpid(), socket.gethostname())
        store.set(KEY, msgspec.json.encode(record).decode())

    def wait(self, seconds: float, check: Callable[[Collection[int]], None]) -> None:
        """Let in every other rank; raises RankError when some have not come within `seconds`.

        `check` is called now and then with the ranks still missing; it may know that one will not come.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            callers: dict[socket.socket, _Caller] = {}
            while missing := set(range(1, self.world.size)) - set(self.joined):
                if time.monotonic() > deadline:
                    raise RankError(f"{_ranks(missing)} did not join within {seconds:g} s; start all {self.world.size} ranks")
                check(missing)
                for key, _ in selector.select(0.2):
                    if key.fileobj is self.listener:
                        caller = _Caller(self.listener.accept()[0])
                        callers[caller.socket] = caller
                        selector.register(caller.socket, selectors.EVENT_READ)
                    elif self._hear(caller := callers[key.fileobj]):  # pyright: ignore[reportArgumentType]
                        selector.unregister(caller.socket)
                        del callers[caller.socket]
                for caller in [caller for caller in callers.values() if caller.late]:
                    selector.unregister(caller.socket)
                    callers.pop(caller.socket).socket.close()
            for caller in callers.values():
                caller.socket.close()
        self.listener.close()

    def _hear(self, caller: _Caller) -> bool:
        """Read what has come from a caller; whether it is known now who that is."""
        try:
            hello = caller.hear()
            if hello is None:
                return False
            if not hmac.compare_digest(hello.token, self.token):
                raise FrameError("it does not know this run's token")
        except (EOFError, OSError) as error:
            log.warning("turned away a connection to the control port: %s", error)
            caller.socket.close()
            return True
        peer = Peer(hello.rank, hello.pid, hello.host)
        if hello.rank in self.joined:
            raise RankError(f"{peer} and {self.joined[hello.rank][0]} are one rank; give every process its own RANK")
        if not 0 < hello.rank < self.world.size:
            raise RankError(f"{peer} is no rank of {self.world.size}; start all ranks with one WORLD_SIZE")
        caller.socket.setblocking(True)
        self.joined[hello.rank] = peer, Link(caller.socket, self.limit)
        return True

    def close(self) -> None:
        """Turn away who comes now; those who have joined stay."""
        self.listener.close()


class _Caller:
    """A connection that has not said who it is. It is read as bytes come, so that a silent stranger keeps nobody waiting."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)
        self.data, self.deadline = bytearray(), time.monotonic() + HELLO_S

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def hear(self) -> Hello | None:
        """The hello, once all of it has come. Not a byte behind it is read."""
        wanted = HEADER.size
        if len(self.data) >= HEADER.size:
            wanted += self._announced()
        try:
            got = self.socket.recv(wanted - len(self.data))
        except BlockingIOError:
            return None
        if not got:
            raise EOFError("it left without a word")
        self.data += got
        if len(self.data) < HEADER.size or len(self.data) < HEADER.size + self._announced():
            return None
        return decode(self.data[HEADER.size :], Hello)

    def _announced(self) -> int:
        header = read_header(self.data[: HEADER.size])
        if header.kind is not FrameKind.HELLO or not 0 < header.nbytes <= LARGEST_HELLO:
            raise FrameError("it did not begin with a hello")
        return header.nbytes


def join(store: Store, world: World, limit: float) -> tuple[Peer, Link]:
    """Another rank's end: connect to rank 0. Raises RankError when it is not there."""
    try:
        published = decode(store.get(KEY), Published)
    except RuntimeError as error:  # a timeout of the store
        raise RankError(f"rank 0 did not come up; look at its own message ({_first_line(error)})") from error
    leader = Peer(0, published.pid, published.machine)
    host = published.host or world.address
    try:
        sock = socket.create_connection((host, published.port), timeout=HELLO_S)
    except OSError as error:
        raise RankError(f"{leader} cannot be reached at {host}, port {published.port}: {error}") from error
    link = Link(sock, limit)
    link.send([encode(FrameKind.HELLO, Hello(published.token, world.rank, os.getpid(), socket.gethostname()))])
    return leader, link


def _listen(*, here: bool) -> socket.socket:
    """A listening socket on any free port; `here`: for processes of this machine alone."""
    if here:
        return socket.create_server((LOOPBACK, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _ranks(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
