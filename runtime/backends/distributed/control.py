"""The control channel: TCP connections between rank 0 and every other rank, kept as long as the ranks live.

Rank 0 listens on any free port and publishes it, with a random token, in the store through which ranks find each other. A
connection that does not send the token is closed. The end of a connection tells a rank, at once and without a request, that
the process at its other end is gone.
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
MAX_HELLO_BYTES = 1024
HELLO_S = 10.0  # seconds for a new connection to send its hello


class KeyValueStore(Protocol):
    """The methods of a torch.distributed.Store that are used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Published(FramePayload, frozen=True):
    """The address of rank 0. An empty host stands for the machine of World.address."""

    host: str
    port: int
    token: str
    pid: int
    machine: str


class WorkerListener:
    """Rank 0's listening socket during the start. `workers`: the ranks that have connected so far."""

    def __init__(self, world: World, timeout: float) -> None:
        """`timeout`: that of every Link."""
        self.world, self.timeout = world, timeout
        self.token = secrets.token_hex(16)
        self.listener = _listen(local=world.on_one_machine)
        self.listener.setblocking(False)
        self.workers: dict[int, tuple[Peer, Link]] = {}

    def publish(self, store: KeyValueStore) -> None:
        """Write address and token into the store."""
        host = LOOPBACK if self.world.on_one_machine else ""
        port = self.listener.getsockname()[1]
        published = Published(host, port, self.token, os.getpid(), socket.gethostname())
        store.set(KEY, msgspec.json.encode(published).decode())

    def wait(self, seconds: float, check: Callable[[Collection[int]], None]) -> None:
        """Accept a connection of every other rank; raises RankError when some are missing after `seconds`.

        `check` is called now and then with the ranks still missing; it raises where one of them has ended.
        """
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            connections: dict[socket.socket, _NewConnection] = {}
            while missing := set(range(1, self.world.size)) - set(self.workers):
                if time.monotonic() > deadline:
                    raise RankError(f"{_ranks(missing)} did not join within {seconds:g} s; start all {self.world.size} ranks")
                check(missing)
                for key, _ in selector.select(0.2):
                    if key.fileobj is self.listener:
                        connection = _NewConnection(self.listener.accept()[0])
                        connections[connection.socket] = connection
                        selector.register(connection.socket, selectors.EVENT_READ)
                    elif self._admit(connection := connections[key.fileobj]):  # pyright: ignore[reportArgumentType]
                        selector.unregister(connection.socket)
                        del connections[connection.socket]
                for connection in [each for each in connections.values() if each.late]:
                    selector.unregister(connection.socket)
                    connections.pop(connection.socket).socket.close()
            for connection in connections.values():
                connection.socket.close()
        self.listener.close()

    def _admit(self, connection: _NewConnection) -> bool:
        """Read what a connection has sent; True once it is decided: a worker was added, or the connection was closed."""
        try:
            hello = connection.read_hello()
            if hello is None:
                return False
            if not hmac.compare_digest(hello.token, self.token):
                raise FrameError("it does not know this run's token")
        except (EOFError, OSError) as error:
            log.warning("refused a connection to the control port: %s", error)
            connection.socket.close()
            return True
        peer = Peer(hello.rank, hello.pid, hello.host)
        if hello.rank in self.workers:
            raise RankError(f"{peer} and {self.workers[hello.rank][0]} have the same rank; give every process its own RANK")
        if not 0 < hello.rank < self.world.size:
            raise RankError(f"{peer} is not among the {self.world.size} ranks; start all ranks with one WORLD_SIZE")
        connection.socket.setblocking(True)
        self.workers[hello.rank] = peer, Link(connection.socket, self.timeout)
        return True

    def close(self) -> None:
        """Stop listening; the connections of workers stay open."""
        self.listener.close()


class _NewConnection:
    """A connection that has not sent its hello. It is read as bytes come, so that a silent client delays no other."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)
        self.data, self.deadline = bytearray(), time.monotonic() + HELLO_S

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def read_hello(self) -> Hello | None:
        """The hello, once all of it has come. No byte after it is read."""
        size = HEADER.size
        if len(self.data) >= HEADER.size:
            size += self._payload_bytes()
        try:
            chunk = self.socket.recv(size - len(self.data))
        except BlockingIOError:
            return None
        if not chunk:
            raise EOFError("it closed without a hello")
        self.data += chunk
        if len(self.data) < HEADER.size or len(self.data) < HEADER.size + self._payload_bytes():
            return None
        return decode(self.data[HEADER.size :], Hello)

    def _payload_bytes(self) -> int:
        header = read_header(self.data[: HEADER.size])
        if header.kind is not FrameKind.HELLO or not 0 < header.nbytes <= MAX_HELLO_BYTES:
            raise FrameError("its first message is not a hello")
        return header.nbytes


def join(store: KeyValueStore, world: World, timeout: float) -> tuple[Peer, Link]:
    """A worker's connection to rank 0. Raises RankError when rank 0 cannot be reached. `timeout`: that of the Link."""
    try:
        published = decode(store.get(KEY), Published)
    except RuntimeError as error:  # a timeout of the store
        raise RankError(f"rank 0 did not start; see its own message ({_first_line(error)})") from error
    leader = Peer(0, published.pid, published.machine)
    host = published.host or world.address
    try:
        sock = socket.create_connection((host, published.port), timeout=HELLO_S)
    except OSError as error:
        raise RankError(f"{leader} cannot be reached at {host}, port {published.port}: {error}") from error
    link = Link(sock, timeout)
    link.send([encode(FrameKind.HELLO, Hello(published.token, world.rank, os.getpid(), socket.gethostname()))])
    return leader, link


def _listen(*, local: bool) -> socket.socket:
    """A listening socket on any free port; `local`: for processes of this machine alone."""
    if local:
        return socket.create_server((LOOPBACK, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _ranks(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
