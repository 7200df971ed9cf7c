"""Hosts that send a byte now and then, at every stage of an answer: nothing of a download is left after its time."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from staticvl.runtime.processor import image_urls
from staticvl.runtime.processor.image_urls import ImageError, connect_in_time, download

REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: %s\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
# path -> what is sent at once, and what is then sent byte by byte for ever
SLOW = {
    "status-line": (b"HTTP/1.1 ", b"2"),
    "header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk-size": (CHUNKED, b"0"),
    "chunk-extension": (CHUNKED + b"5;", b"x"),
    "chunk": (CHUNKED + b"ffff\r\n", b"x"),
    "trailer": (CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "body-without-length": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "redirect": (REDIRECT % b"/body", b"X: y\r\n"),
    "redirected": (REDIRECT % b"/header" + b"Content-Length: 0\r\n\r\n", b""),
    "error": (b"HTTP/1.1 500 Oh\r\n", b"X: y\r\n"),
    "nothing": (b"", b""),
}
TLS = b"\x16\x03\x03\x40\x00\x02"  # the head of a handshake record of 16 KiB


def _part(data: bytes) -> tuple[bytes, bytes]:
    """What is sent at once, and then byte by byte."""
    if data[:1] == TLS[:1]:
        return TLS, b"\0"
    method, target = data.split()[:2]
    return (b"HTTP/1.1 200 ", b"x") if method == b"CONNECT" else SLOW[target.decode().strip("/")]


class SlowHost:
    """Answers as SLOW says, until its client goes; a client that greets in TLS gets a handshake likewise."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self._answer, args=(connection,), daemon=True))
                self.threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            data = connection.recv(4096)
            if not data:
                return
            first, drops = _part(data)
            connection.sendall(first)
            connection.settimeout(0.02)  # between two bytes, unless the client goes
            while True:
                for drop in drops or b"\0":
                    if drops:
                        connection.sendall(bytes([drop]))
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(4096):
                            return

    def settle(self) -> None:
        """Wait until every client has gone."""
        for thread in self.threads[1:]:
            thread.join(timeout=20)
            assert not thread.is_alive(), "a connection outlived its download"

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.threads[0].join(timeout=20)
        self.settle()


@pytest.fixture
def host() -> Iterator[SlowHost]:
    running = SlowHost()
    yield running
    running.close()


def descriptors() -> set[str]:
    """What the open descriptors of this process name; sockets by their inode, which no other has."""
    gc.collect()  # sockets of earlier tests go now, not during a count
    open_now = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that listed the folder
            open_now.add(str(descriptor.readlink()))
    return open_now


def downloads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "staticvl-download"]


def give_up(url: str, timeout_s: float = 0.3) -> str:
    with pytest.raises(ImageError) as raised:
        download(url, timeout_s=timeout_s, max_bytes=1 << 20)
    return str(raised.value)


def check_nothing_left(host: SlowHost, before: set[str]) -> None:
    for thread in downloads():
        thread.join(timeout=20)
        assert not thread.is_alive(), "a thread outlived its download"
    host.settle()
    assert not descriptors() - before


@pytest.mark.parametrize("path", SLOW)
def test_nothing_is_left_of_a_slow_answer(host: SlowHost, path: str) -> None:
    before = descriptors()
    assert f"/{path} did not arrive within 0.3 s" in give_up(f"http://127.0.0.1:{host.port}/{path}")
    check_nothing_left(host, before)


def test_nothing_is_left_of_a_slow_handshake(host: SlowHost) -> None:
    image_urls._certificates()  # whose files are read once
    before = descriptors()
    assert "did not arrive within 0.3 s" in give_up(f"https://127.0.0.1:{host.port}/x")
    check_nothing_left(host, before)


def test_nothing_is_left_of_a_slow_proxy(host: SlowHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{host.port}")
    before = descriptors()
    assert "did not arrive within 0.3 s" in give_up("https://images.example/x")
    check_nothing_left(host, before)


def test_many_at_once_leave_nothing(host: SlowHost) -> None:
    before = descriptors()
    urls = [f"http://127.0.0.1:{host.port}/{path}" for path in ("status-line", "headers", "chunk-size", "body")] * 12
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(give_up, urls))
    assert all("did not arrive" in each for each in said) and len(said) == 48
    check_nothing_left(host, before)


def test_the_body_of_a_redirect_is_not_read() -> None:
    """It may have no end, and would be kept in memory."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    sent: list[int] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(REDIRECT % b"/here" + b"\r\n")
            while sum(sent) < 64 << 20:
                sent.append(connection.send(bytes(1 << 16)))
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert download(f"http://127.0.0.1:{port}/", timeout_s=20, max_bytes=1000) == b"hi"
    thread.join(timeout=20)
    listener.close()
    assert sum(sent) < 16 << 20  # what the buffers of both ends hold


def test_all_addresses_of_a_host_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    clock = iter(range(0, 1000, 4))

    def opened(_family: int, _kind: int, _protocol: int, _place: tuple, timeout: float) -> socket.socket:
        given.append(timeout)
        raise TimeoutError

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 80)) for i in range(50)]
    monkeypatch.setattr(image_urls.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(image_urls.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(image_urls, "_opened", opened)
    with pytest.raises(TimeoutError):
        connect_in_time(("many.example", 80), 10)
    assert given == [6, 2]


def test_every_address_is_checked_before_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 80)) for i in range(3)]
    monkeypatch.setattr(image_urls.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(image_urls, "_opened", lambda *_: pytest.fail("a connection before the last check"))

    def check(place: str) -> None:
        if place.endswith(".2"):
            raise ImageError(place)

    with pytest.raises(ImageError, match=r"192\.0\.2\.2"):
        connect_in_time(("three.example", 80), 10, check)


def test_a_connection_after_the_end_is_refused() -> None:
    """The thread of a download may be about to follow a redirect when its time is over."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = image_urls._Connections(connect_in_time, 10)
        connections.end()
        before = descriptors()
        with pytest.raises(TimeoutError):
            connections.connect(("127.0.0.1", listener.getsockname()[1]))
        assert not descriptors() - before
