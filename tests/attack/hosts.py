"""A host on loopback that serves images badly: slowly, endlessly, elsewhere, or not at all."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .models import IMAGE

DRIP_S = 0.2
LONGEST_S = 20.0  # that a host goes on, unless the client leaves before


@dataclass
class Host:
    """Where it listens, and the paths that it was asked for."""

    port: int
    seen: list[str] = field(default_factory=list)


@contextlib.contextmanager
def hosting() -> Iterator[Host]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        host = server.host = Host(server.server_port)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield host
        server.shutdown()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    host: Host

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave: that is what this host is for."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.host.seen.append(self.path)
        path, _, query = self.path.partition("?")
        name = path.strip("/").split("/")[0]
        if name == "to":
            self._redirect(urllib.parse.unquote(query))
        elif name == "chain":
            self._redirect(f"/chain?{int(query or 0) + 1}")
        elif name == "status":
            self.send_error(int(query))
        else:
            BAD[name](self)

    def _redirect(self, target: str) -> None:
        self.wfile.write(b"HTTP/1.1 302 Found\r\nLocation: %b\r\n\r\n" % target.encode("utf-8", "surrogatepass"))

    def head(self, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def drip(self, data: bytes) -> None:
        """A byte at a time."""
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(DRIP_S)
                if time.monotonic() > end:
                    return


def _image(handler: _Handler) -> None:
    data = IMAGE.read_bytes()
    handler.head(Content_Type="image/png", Content_Length=str(len(data)))
    handler.wfile.write(data)


def _drip(handler: _Handler) -> None:
    handler.head()
    handler.drip(IMAGE.read_bytes())


def _drip_chunks(handler: _Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.head(Transfer_Encoding="chunked")
    handler.drip(b"1\r\nx\r\n")


def _drip_status(handler: _Handler) -> None:
    handler.drip(b"HTTP/1.1 200 OK\r\n")


def _drip_headers(handler: _Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.drip(b"A: b\r\n")


def _continues(handler: _Handler) -> None:
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        time.sleep(DRIP_S)


def _hang(handler: _Handler) -> None:
    with contextlib.suppress(OSError):
        handler.connection.settimeout(LONGEST_S)
        handler.connection.recv(1)


def _endless(handler: _Handler) -> None:
    handler.head()
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        handler.wfile.write(bytes(1 << 16))


def _endless_header(handler: _Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nA: ")
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        handler.wfile.write(b"x" * 65536)


def _many_headers(handler: _Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 50_000 + b"\r\n")


def _gzip(handler: _Handler) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    handler.head(Content_Encoding="gzip")
    handler.wfile.write(packer.compress(bytes(50 << 20)) + packer.flush())


def _raw(data: bytes) -> Callable[[_Handler], None]:
    def write(handler: _Handler) -> None:
        handler.wfile.write(data)

    return write


OK = b"HTTP/1.1 200 OK\r\n"
BAD: dict[str, Callable[[_Handler], None]] = {
    "image": _image, "drip": _drip, "drip-chunks": _drip_chunks, "drip-status": _drip_status, "drip-headers": _drip_headers,
    "continues": _continues, "hang": _hang, "endless": _endless, "endless-header": _endless_header,
    "many-headers": _many_headers, "gzip": _gzip, "empty": _raw(b""), "no-http": _raw(b"hello\r\n\r\n"),
    "zeros": _raw(bytes(10_000)), "version-9": _raw(b"HTTP/9.9 200 OK\r\n\r\n"), "no-status": _raw(b"HTTP/1.1\r\n\r\n"),
    "odd-status": _raw(b"HTTP/1.1 99999999999999 OK\r\n\r\n"),
    "long-line": _raw(b"HTTP/1.1 200 " + b"x" * 200_000 + b"\r\n\r\n"), "short": _raw(OK + b"Content-Length: 100\r\n\r\nabc"),
    "negative": _raw(OK + b"Content-Length: -5\r\n\r\nabc"),
    "many-digits": _raw(OK + b"Content-Length: " + b"9" * 6000 + b"\r\n\r\nabc"),
    "no-number": _raw(OK + b"Content-Length: \xb2\r\n\r\nabc"),
    "claims-much": _raw(OK + b"Content-Length: 999999999999\r\n\r\nabc"),
    "bad-chunk": _raw(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc"),
    "huge-chunk": _raw(OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc"),
    "minus-chunk": _raw(OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc"),
    "cut-chunk": _raw(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"), "no-location": _raw(b"HTTP/1.1 302 Found\r\n\r\n"),
    "two-locations": _raw(b"HTTP/1.1 302 Found\r\nLocation: /image\r\nLocation: file:///etc/passwd\r\n\r\n"),
    "odd-location": _raw(b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe\0\r\n\r\n"), "text": _raw(OK + b"\r\nroot:x:0:0"),
    "refresh": _raw(OK + b"Refresh: 0; url=/image\r\n\r\n"),
}  # fmt: skip
