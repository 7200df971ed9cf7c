"""Bytes that are hardly HTTP, or that come as no honest client sends them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .case import Attempt, Kind
from .mutate import BYTES, shuffled
from .server import PATH, REFUSALS, Target, checked, request, serving

WAIT_S = 15.0  # for an answer or the end of the connection
# Sent; waited for; "half": no more is sent, "reset": the connection is dropped, "end": it has to be ended by the server.
Piece = bytes | float | str


def exchange(port: int, pieces: Sequence[Piece]) -> str:
    """Send the pieces, then read one response: its status, "closed" without one, or "no answer in time"."""
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)) as connection:
        for piece in pieces:
            try:
                if not _play(connection, piece):
                    return "closed"
            except (BrokenPipeError, ConnectionResetError):
                break
        return _read(connection, to_the_end="end" in pieces)


def _play(connection: socket.socket, piece: Piece) -> bool:
    """Whether there is anything more to do."""
    if isinstance(piece, bytes):
        connection.sendall(piece)
    elif isinstance(piece, float):
        time.sleep(piece)
    elif piece == "half":
        connection.shutdown(socket.SHUT_WR)
    elif piece == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False
    return True


def _read(connection: socket.socket, *, to_the_end: bool) -> str:
    data, end = b"", time.monotonic() + WAIT_S
    while to_the_end or not _complete(data):
        connection.settimeout(max(end - time.monotonic(), 0.01))
        try:
            part = connection.recv(65536)
        except TimeoutError:
            return f"no answer in time: {data[:200]!r}"
        except ConnectionResetError:
            part = b""
        if not part:
            break
        data += part
    return _status(data)


def _complete(data: bytes) -> bool:
    """Whether a response is there as a whole, as far as a length says it."""
    data = _final(data)
    head, gap, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    return bool(gap and lengths) and len(body) >= int(lengths[0].split(b":")[1])


def _final(data: bytes) -> bytes:
    """Without an interim response (100 Continue)."""
    return data.partition(b"\r\n\r\n")[2] if data.startswith(b"HTTP/1.1 100") else data


def _status(data: bytes) -> str:
    data = _final(data)
    if not data:
        return "closed"
    words = data.split(None, 2)
    if not data.startswith(b"HTTP/1.") or len(words) < 2 or not words[1].isdigit():
        return f"no HTTP: {data[:200]!r}"
    return "HTTP 200" if words[1] == b"200" else f"HTTP {words[1].decode()}"


BODY = json.dumps(request(max_tokens=2)).encode()
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
SIZED = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HONEST = SIZED + BODY
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def _slow(data: bytes, pause: float, size: int) -> list[Piece]:
    return [piece for i in range(0, len(data), size) for piece in (data[i : i + size], pause)]


LINES = (
    b"", b"\r\n", b"\n", b"\0", b"GET", b"GET /", b"GET / HTTP/1.1", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1.1\r\n\r\n",
    b"GET  /  HTTP/1.1\r\n\r\n", b"get / http/1.1\r\n\r\n", b"G\xffT / HTTP/1.1\r\n\r\n",
    b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://127.0.0.1:22/ HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%2e%2e/%00 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v1/models/../../etc HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /v1/models/" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /" + b"a" * 300_000,
    b"GET /?" + b"&a=b" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n", b"{}" * 100,
    b"POST /v1/chat/completions/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
)  # fmt: skip
HEADERS = (
    b"Host: y", b"Host:", b": x", b"A", b"A b: c", b" A: b", b"A: b\n", b"A: \0", b"A: \xff\xfe", b"A: b\r\n c", b"\xff: x",
    b"A: " + b"x" * 70_000, b"A: x\r\n" * 5000, b"Expect: 100-continue", b"Expect: nothing",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==", b"Upgrade: h2c\r\nConnection: Upgrade",
    b"Connection: \x01", b"Content-Encoding: gzip", b"Content-Encoding: br, gzip", b"Authorization: Bearer \xff",
    b"Authorization: " + b"x" * 9000, b"Range: bytes=0-99999999999", b"Cookie: " + b"a=b; " * 5000,
    b"X-Forwarded-For: 127.0.0.1", b"Content-Type: application/json; charset=utf-16", b"Content-Type: text/plain",
    b"Origin: http://evil", b"TE: trailers",
)  # fmt: skip
LENGTHS = (
    b"Content-Length: -1", b"Content-Length: +5", b"Content-Length: 5, 5", b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 0x5", b"Content-Length: ", b"Content-Length: x", b"Content-Length: 99999999999999999999",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: x", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding: \x0bchunked", b"Content-Length: \xb2",
)  # fmt: skip
CHUNKS = (
    b"x\r\n", b"-1\r\n", b"ffffffffffffffff\r\n", b"fffffffffffffffffffffff\r\n", b"5\r\nabc", b"5\r\nabcdefgh\r\n0\r\n\r\n",
    b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n", b"0;a=b\r\n\r\n", b"5;" + b"x" * 70_000, b"0x5\r\nhello\r\n0\r\n\r\n",
    b"5 \r\nhello\r\n0\r\n\r\n", b"\r\n", b"1\r\n{\r\n" * 2000 + b"0\r\n\r\n", b"1\nx\n0\n\n",
    b"0\r\n" + b"A: b\r\n" * 20_000, b"400000\r\n" + b" " * 0x400000 + b"\r\n2\r\n  \r\n0\r\n\r\n",
)  # fmt: skip


def menu() -> list[tuple[str, Sequence[Piece]]]:
    """What, and what is sent."""
    found: list[tuple[str, Sequence[Piece]]] = [(f"the line {line[:50]!r}", [line]) for line in LINES]
    found += [(f"the line {line[:50]!r}, then no more", [line, "half"]) for line in LINES]
    found += [(f"the header {each[:50]!r}", [GET + each + b"\r\n\r\n"]) for each in HEADERS]
    found += [(f"the header {each[:50]!r} of a completion", [SIZED[:-2] + each + b"\r\n\r\n" + BODY]) for each in HEADERS]
    found += [(f"the length {each[:50]!r}", [HEAD + each + b"\r\n\r\n" + BODY]) for each in LENGTHS]
    found += [(f"the chunk {each[:50]!r}", [CHUNKED + each]) for each in CHUNKS]
    found += [(f"the chunk {each[:50]!r}, then no more", [CHUNKED + each, "half"]) for each in CHUNKS]
    return shuffled(found) + _timings()


def _timings() -> list[tuple[str, Sequence[Piece]]]:
    """Senders that are slow, early to leave, or many at once in one connection."""
    places = (1, 30, len(HEAD), len(SIZED), len(SIZED) + 10, len(HONEST) - 1)
    found: list[tuple[str, Sequence[Piece]]] = [
        (f"a client that drops the connection after {n} bytes", [HONEST[:n], "reset"]) for n in places
    ]
    found += [(f"a client that ends after {n} bytes", [HONEST[:n], "half"]) for n in places]
    found += [(f"a client that waits after {n} bytes", [HONEST[:n]]) for n in places]
    found += [("a client that drops the connection while it is answered", [HONEST, 0.01, "reset"])]
    found += [("a client that ends after a whole request", [HONEST, "half"])]
    found += [
        ("a head a byte at a time", _slow(HEAD, 0.05, 1)),
        ("a body some bytes at a time", [SIZED, *_slow(BODY, 0.1, 100)]),
        ("chunks one at a time", [CHUNKED, *[piece for _ in range(40) for piece in (b"1\r\n \r\n", 0.1)]]),
        ("a second request that does not come", [GET + b"\r\n", "end"]),
        ("a second request whose head is not ended", [GET + b"\r\n", 0.2, GET[:20], "end"]),
        ("a second request a byte at a time", [GET + b"\r\n", 0.2, *_slow(HEAD, 0.1, 1), "end"]),
        ("ten requests at once", [(GET + b"\r\n") * 10]),
        ("five thousand requests at once", [(GET + b"\r\n") * 5000]),
        ("five completions at once", [HONEST * 5]),
        ("a completion, then bytes that are none", [HONEST + b"\0" * 1000]),
        ("a completion, then what a proxy may take for another", [HONEST + b"GET /admin HTTP/1.1\r\n\r\n"]),
        ("a body longer than its length", [SIZED + BODY + b"x" * 100_000]),
        ("a stream that is not read", [_streamed(), 0.5, "reset"]),
        ("a stream of which no more is read", [_streamed(), "half"]),
    ]
    return found


def _streamed() -> bytes:
    body = json.dumps(request(max_tokens=100, stream=True, ignore_eos=True)).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@dataclass(frozen=True, slots=True)
class Ground:
    target: Target
    menu: tuple[tuple[str, Sequence[Piece]], ...]


@contextlib.contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    with serving(folder, "wire") as target:
        yield Ground(target, tuple(menu()))


def make(ground: Ground, rng: random.Random, index: int) -> Attempt:
    port = ground.target.port
    if index < len(ground.menu):
        what, pieces = ground.menu[index]
        return Attempt(what, checked(ground.target, lambda: exchange(port, pieces)))
    damages: dict[str, Callable[[random.Random, bytes], bytes]] = {**BYTES, "mixed": _mixed}
    damage = rng.choice(list(damages))
    head = rng.random() < 0.7
    data = damages[damage](rng, SIZED) + BODY if head else SIZED + damages[damage](rng, BODY)
    pieces = [data, *(["half"] if rng.random() < 0.5 else [])]
    return Attempt(f"{damage} in the {'head' if head else 'body'}", checked(ground.target, lambda: exchange(port, pieces)))


def _mixed(rng: random.Random, data: bytes) -> bytes:
    """Lines in another order, some twice, some with other ends."""
    lines = data.split(b"\r\n")
    rng.shuffle(lines)
    return b"".join(line + rng.choice((b"\r\n", b"\n", b"\r", b"\r\n\r\n")) for line in lines + lines[:2])


KIND = Kind(
    name="wire",
    what="malformed request lines, headers, lengths and chunks; pipelines; clients that are slow or leave",
    endings=(*REFUSALS, "HTTP 200", "HTTP 204", "closed"),
    limit_s=40,
    count=500,
    ground=ground,
    make=make,
    inside=False,
)
