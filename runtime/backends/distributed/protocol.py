"""The wire protocol between rank 0 and another rank: frames, each a header of fixed size and a payload.

The header of a RUN frame says which graph runs, and so into which arrays the payload is received: those that the backend has
bound. Nothing is padded and nothing is copied on the way; reading a header first costs a system call. All other payloads are
small JSON objects. Nothing is ever unpickled.
"""

from __future__ import annotations

import enum
import selectors
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

MAGIC = b"SVR1"  # changes with the layout of any frame
HEADER = struct.Struct("<4sHHiiQQ")  # magic, kind, graph, slot, image, run number, bytes of payload
MAX_PAYLOAD_BYTES = 1 << 16  # of payloads that are not feeds
P = TypeVar("P", bound="FramePayload")


class FrameKind(enum.IntEnum):
    """The kind of a frame; the comments give its sender and its payload."""

    HELLO = 1  # rank -> 0: Hello
    OPENED = 2  # rank -> 0: Opened
    GO = 3  # 0 -> rank: Go
    READY = 4  # rank -> 0: every graph is loaded
    RUN = 5  # 0 -> rank: run a graph; the payload is its feed
    LOAD = 6  # 0 -> rank: load a graph
    UNLOAD = 7  # 0 -> rank: unload a graph
    PING = 8  # 0 -> rank: status request
    STATE = 9  # rank -> 0: State, the answer to it
    FAILED = 10  # rank -> 0: Failed
    FAILURE_REPORT = 11  # 0 -> rank: FailureReport; stop
    STOP = 12  # 0 -> rank: stop, all is well
    COPY = 13  # 0 -> rank: Copy
    GIVE_BACK = 14  # 0 -> rank: GiveBack
    SMALL_PAGES = 15  # 0 -> rank: Backend.use_small_pages
    COPY_PAGE = 16  # 0 -> rank: CopyPage


class FramePayload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of payloads that are not feeds."""


class Hello(FramePayload, frozen=True):
    """The first message of a worker."""

    token: str
    rank: int
    pid: int
    host: str


class Opened(FramePayload, frozen=True):
    """The artifact of a rank: the digest of its manifest, or the error of opening it."""

    digest: str = ""
    error: str = ""


class Go(FramePayload, frozen=True):
    """address: of rank 0 as others see it, for ranks on its machine; timeout: seconds that a collective may wait."""

    address: str
    timeout: float


class State(FramePayload, frozen=True, rename={"activity": "doing"}):
    """The activity of a worker; "meeting": it is in a collective."""

    activity: Literal["idle", "computing", "meeting"]


class Failed(FramePayload, frozen=True, rename={"in_collective": "meeting"}):
    """The error of a worker that cannot go on. in_collective: a collective failed, perhaps because of another rank."""

    text: str
    in_collective: bool


class Copy(FramePayload, frozen=True):
    """Arguments of Backend.copy_slot."""

    source: int
    target: int
    rows: int
    images: int


class CopyPage(FramePayload, frozen=True):
    """Arguments of Backend.copy_page."""

    source: int
    target: int


class GiveBack(FramePayload, frozen=True):
    """Arguments of Backend.give_back."""

    slot: int
    rows: int


class FailureReport(FramePayload, frozen=True):
    """A sentence about the ranks at fault, see failures.failure_report."""

    text: str


class FrameError(ConnectionError):
    """The bytes received are not a frame of this protocol."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a frame, 32 bytes."""

    kind: FrameKind
    graph: int = 0  # index in manifest.graphs
    slot: int = 0
    image: int = 0
    run: int = 0  # counts runs
    nbytes: int = 0  # of payload

    def packed(self) -> bytes:
        return HEADER.pack(MAGIC, self.kind, self.graph, self.slot, self.image, self.run, self.nbytes)


def read_header(data: bytes | bytearray) -> Header:
    """Raises FrameError for bytes that no rank of this release sends."""
    magic, kind, *rest = HEADER.unpack(data)
    if magic != MAGIC or kind not in FrameKind.__members__.values():
        raise FrameError("the bytes received are no message of this release of staticvl; use one release on all machines")
    return Header(FrameKind(kind), *rest)


def encode(kind: FrameKind, payload: FramePayload | None = None) -> bytes:
    """A whole frame with a JSON payload, or none."""
    data = msgspec.json.encode(payload) if payload else b""
    return Header(kind, nbytes=len(data)).packed() + data


def decode(data: bytes | bytearray, payload: type[P]) -> P:
    """A payload of that type from JSON; raises FrameError for anything else."""
    try:
        return msgspec.json.decode(data, type=payload)
    except msgspec.MsgspecError as error:
        raise FrameError(f"a message cannot be read: {error}") from error


class Link:
    """One end of a connection between two ranks, for a thread that receives and a thread that sends.

    `timeout`: seconds without progress after which an unfinished frame is an error. Idle links have no limit.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.socket = sock
        self._sending = threading.Lock()
        sock.settimeout(timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that vanishes sends no end of file: probe after 30 s of silence, six times.
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            if option := getattr(socket, name, None):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send buffers of bytes one after another, as one frame; raises OSError where the peer is gone or stalls."""
        with self._sending:
            while buffers:
                count = self.socket.sendmsg(buffers)
                buffers = _unsent(buffers, count)

    def try_send(self, frame: bytes) -> bool:
        """Send a small frame if that needs no waiting; whether it was sent. For peers that may be stuck or gone."""
        if not self._sending.acquire(timeout=0.1):
            return False
        try:
            if not _writable(self.socket):
                return False
            self.socket.sendall(frame)
            return True
        except OSError:
            return False
        finally:
            self._sending.release()

    def receive_header(self) -> Header:
        """The next header; raises EOFError at the end, OSError where the peer is gone or stalls."""
        data = bytearray(HEADER.size)
        self.receive_into(memoryview(data))
        return read_header(data)

    def receive_into(self, view: memoryview) -> None:
        """Fill a view of bytes; raises as `receive_header` does."""
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise EOFError("the connection was closed")
            view = view[count:]

    def receive_payload(self, header: Header, payload: type[P]) -> P:
        """The JSON payload that follows a header; raises FrameError for one that is too large or of another type."""
        if header.nbytes > MAX_PAYLOAD_BYTES:
            raise FrameError(f"a message announces {header.nbytes} bytes; expected at most {MAX_PAYLOAD_BYTES}")
        data = bytearray(header.nbytes)
        self.receive_into(memoryview(data))
        return decode(data, payload)

    def close(self) -> None:
        self.socket.close()


def _unsent(buffers: Sequence[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """The rest of buffers of which the first `count` bytes were sent."""
    for place, buffer in enumerate(buffers):
        if count < len(buffer):
            return [memoryview(buffer)[count:], *buffers[place + 1 :]]
        count -= len(buffer)
    return []


def _writable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        return bool(selector.select(0))
