"""A small key-value store by which ranks find each other, where no launcher gives one. It is bounded: in its keys and
bytes, and in the seconds of every request. What is set is neither changed nor deleted.

A client connects, sends one request, and gets one answer:

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

MAX_KEYS = 4096
MAX_VALUE_BYTES = 64 << 10  # bytes of one value
MAX_BYTES = 1 << 20  # of all keys and values
MAX_CLIENTS = 64  # at a time; further ones wait in the system's queue
REQUEST_S = 5.0  # seconds of one request, from its first byte to the answer
POLL_S = 0.02  # seconds between two requests for a key that is not there yet
_REQUEST, _ANSWER = struct.Struct("<cII"), struct.Struct("<cI")


class StoreServer(socketserver.ThreadingTCPServer):
    """Rank 0's store, on a listening socket, until `close`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _RequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.values: dict[bytes, bytes] = {}
        self.lock, self.free_places = threading.Lock(), threading.BoundedSemaphore(MAX_CLIENTS)
        self.port: int = listener.getsockname()[1]
        threading.Thread(target=self.serve_forever, args=(POLL_S,), daemon=True, name="staticvl-store").start()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.free_places.acquire()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        super().shutdown_request(request)
        self.free_places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is silent or leaves concerns no other client, so the log has no line about it."""

    def set(self, key: bytes, value: bytes) -> bool:
        """Set a key; whether it has this value now. A key that has another keeps it, and beyond the limits none is added."""
        with self.lock:
            if key not in self.values:
                size = sum(len(k) + len(v) for k, v in self.values.items()) + len(key) + len(value)
                if len(self.values) >= MAX_KEYS or size > MAX_BYTES:
                    return False
                self.values[key] = value
            return self.values[key] == value

    def close(self) -> None:
        """Stop listening. May be called again."""
        self.shutdown()
        self.server_close()


class _RequestHandler(socketserver.BaseRequestHandler):
    server: StoreServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle(self) -> None:
        end = time.monotonic() + REQUEST_S
        action, key_bytes, value_bytes = _REQUEST.unpack(receive_exactly(self.request, _REQUEST.size, end))
        data: bytes | None = None
        if key_bytes <= MAX_VALUE_BYTES and value_bytes <= MAX_VALUE_BYTES:
            key, value = receive_exactly(self.request, key_bytes, end), receive_exactly(self.request, value_bytes, end)
            if action == b"G":
                data = self.server.values.get(key)
            elif action == b"S" and self.server.set(key, value):
                data = b""
        answer = _ANSWER.pack(b"-" if data is None else b"+", len(data or b""))
        self.request.settimeout(max(end - time.monotonic(), 0.01))
        self.request.sendall(answer + (data or b""))


def send_request(host: str, port: int, action: bytes, key: str, value: bytes = b"") -> bytes | None:
    """The answer of a store to one request; None: the key is not there, or the value was refused. Raises OSError."""
    end, name = time.monotonic() + REQUEST_S, key.encode()
    with socket.create_connection((host, port), timeout=REQUEST_S) as connection:
        connection.sendall(_REQUEST.pack(action, len(name), len(value)) + name + value)
        outcome, size = _ANSWER.unpack(receive_exactly(connection, _ANSWER.size, end))
        data = receive_exactly(connection, min(size, MAX_VALUE_BYTES), end)
    return data if outcome == b"+" else None


def receive_exactly(connection: socket.socket, count: int, end: float) -> bytes:
    """The next `count` bytes of a connection, by `end`, a time of time.monotonic; raises OSError."""
    data = bytearray()
    while len(data) < count:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise ConnectionError("the connection ended in the middle of a message")
        data += chunk
        if time.monotonic() > end:
            raise TimeoutError("a message took too long")
    return bytes(data)
