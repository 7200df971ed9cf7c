"""A small key-value store by which ranks find each other, where no launcher gives one. It is bounded: it holds so many keys and
bytes, every caller has so many seconds, and what is set is neither changed nor deleted.

A caller connects, sends one request, and gets one answer:

    request   1 byte, "S" (set) or "G" (get); 4 bytes, length of the key; 4 bytes, length of the value; key; value
    answer    1 byte, "+" or "-" (not there, or refused); 4 bytes, length of the value; value

Numbers are little-endian. torch's TCPStore, which it replaces, has no limits.
"""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time

MOST_KEYS = 4096
MOST_VALUE = 64 << 10  # bytes of one value
MOST_BYTES = 1 << 20  # of all keys and values
MOST_CALLERS = 64  # at a time; further ones wait in the system's queue
CALL_S = 5.0  # for one request, from its first byte to the answer
POLL_S = 0.02  # between two looks for a key that is not there yet
_REQUEST, _ANSWER = struct.Struct("<cII"), struct.Struct("<cI")


class StoreServer(socketserver.ThreadingTCPServer):
    """Rank 0's store, on a listening socket, until `close`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _Caller, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.values: dict[bytes, bytes] = {}
        self.lock, self.room = threading.Lock(), threading.BoundedSemaphore(MOST_CALLERS)
        self.port: int = listener.getsockname()[1]
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True, name="staticvl-store").start()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.room.acquire()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        super().shutdown_request(request)
        self.room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that is silent or leaves concerns no other caller, so the log has no line about it."""

    def set(self, key: bytes, value: bytes) -> bool:
        """Whether the key has this value now. One that has another keeps it, and none is taken beyond the limits."""
        with self.lock:
            if key not in self.values:
                size = sum(len(k) + len(v) for k, v in self.values.items()) + len(key) + len(value)
                if len(self.values) >= MOST_KEYS or size > MOST_BYTES:
                    return False
                self.values[key] = value
            return self.values[key] == value

    def close(self) -> None:
        """Listen no more. May be called again."""
        self.shutdown()
        self.server_close()


class _Caller(socketserver.BaseRequestHandler):
    server: StoreServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle(self) -> None:
        end = time.monotonic() + CALL_S
        action, key_bytes, value_bytes = _REQUEST.unpack(received(self.request, _REQUEST.size, end))
        found: bytes | None = None
        if key_bytes <= MOST_VALUE and value_bytes <= MOST_VALUE:
            key, value = received(self.request, key_bytes, end), received(self.request, value_bytes, end)
            if action == b"G":
                found = self.server.values.get(key)
            elif action == b"S" and self.server.set(key, value):
                found = b""
        answer = _ANSWER.pack(b"-" if found is None else b"+", len(found or b""))
        self.request.settimeout(max(end - time.monotonic(), 0.01))
        self.request.sendall(answer + (found or b""))


def call(host: str, port: int, action: bytes, key: str, value: bytes = b"") -> bytes | None:
    """One request to a store; None: the key is not there, or the value was refused. Raises OSError."""
    end, name = time.monotonic() + CALL_S, key.encode()
    with socket.create_connection((host, port), timeout=CALL_S) as connection:
        connection.sendall(_REQUEST.pack(action, len(name), len(value)) + name + value)
        kind, size = _ANSWER.unpack(received(connection, _ANSWER.size, end))
        found = received(connection, min(size, MOST_VALUE), end)
    return found if kind == b"+" else None


def received(connection: socket.socket, count: int, end: float) -> bytes:
    """So many bytes, by a time of time.monotonic; raises OSError."""
    data = bytearray()
    while len(data) < count:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        part = connection.recv(count - len(data))
        if not part:
            raise ConnectionError("the connection ended in the middle of a message")
        data += part
        if time.monotonic() > end:
            raise TimeoutError("a message took too long")
    return bytes(data)
