"""Images at http(s) URLs to bytes: downloads whose size, time and connections are bounded."""

from __future__ import annotations

import contextlib
import functools
import http.client
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from ..shown import shown
from .image_data import ImageError

__all__ = ["MIB", "Connect", "ImageError", "connect_in_time", "download"]

MIB = 1 << 20
Connect: TypeAlias = Callable[[tuple[str, int], float | None], socket.socket]


class _Connections:
    """The connections of one download, one after another: a redirect ends the one before. None outlives the download: a
    socket's own timeout bounds one read, and a host that sends a byte now and then would hold socket and thread for ever."""

    def __init__(self, connect: Connect, timeout_s: float) -> None:
        self._connect, self._deadline = connect, time.monotonic() + timeout_s
        self._lock, self._over = threading.Lock(), False
        self._current: socket.socket | None = None

    def connect(self, address: tuple[str, int]) -> socket.socket:
        """A connection to a host in the time that is left; raises TimeoutError when there is none."""
        with self._lock:
            self._drop()
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        connection = self._connect(address, seconds)
        with self._lock:
            if self._over:
                connection.close()
                raise TimeoutError
            self._current = connection.dup()  # TLS takes the descriptor of the connection itself away
        return connection

    def end(self) -> None:
        """Close the connection; a thread that waits for it finds its end."""
        with self._lock:
            self._over = True
            self._drop()

    def _drop(self) -> None:
        if self._current is not None:
            with contextlib.suppress(OSError):  # the host may have ended it
                self._current.shutdown(socket.SHUT_RDWR)
            self._current.close()
            self._current = None


def connect_in_time(
    address: tuple[str, int], timeout: float | None, check: Callable[[str], None] | None = None
) -> socket.socket:
    """A connection to the first address of a host that answers, `timeout` seconds for all of them together.

    `check` is called with every address of the host before any connection is opened, and may raise. A name server's own time
    is not bounded here. Raises OSError.
    """
    host, port = address
    places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, place in places:
        if check:
            check(str(place[0]))
    deadline = None if timeout is None else time.monotonic() + timeout
    last: OSError = OSError("the host has no address")
    for family, kind, protocol, _, place in places:
        seconds = None if deadline is None else deadline - time.monotonic()
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        try:
            return _opened(family, kind, protocol, place, seconds)
        except OSError as error:
            last = error
    raise last


def _opened(family: int, kind: int, protocol: int, place: tuple, timeout: float | None) -> socket.socket:
    connection = socket.socket(family, kind, protocol)
    try:
        connection.settimeout(timeout)
        connection.connect(place)
    except BaseException:
        connection.close()
        raise
    return connection


def download(url: str, *, timeout_s: float, max_bytes: int, connect: Connect | None = None) -> bytes:
    """The bytes at an http(s) URL; raises ImageError.

    `timeout_s` is the time that all of it may take, redirects included; afterwards no socket and no thread of it is left, but
    for a thread that waits for a name server. `connect` (address, timeout in seconds) opens every
    connection, to hosts of redirects too, and may refuse one with ImageError; then no proxy is used, since that would choose
    the address. By default any address is reached, by the environment's proxies where it names some.
    """
    name = shown(url)
    request = _request(url, name)
    connections = _Connections(connect or connect_in_time, timeout_s)
    opener = _opener(connections, proxies=connect is None)
    result: Future[bytes] = Future()

    # Runs in a thread of its own, which `connections.end` ends.
    def work() -> None:
        try:
            result.set_result(_fetch(request, name, timeout_s, max_bytes, opener))
        except Exception as error:  # raised in the caller
            result.set_exception(error)

    threading.Thread(target=work, daemon=True, name="staticvl-download").start()
    try:
        return result.result(timeout=timeout_s)
    except TimeoutError:
        raise ImageError(f"{name} did not arrive within {timeout_s:g} s") from None
    finally:
        connections.end()


def _request(url: str, name: str) -> urllib.request.Request:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(f"{name} has the scheme {shown(scheme)}; expected http or https, or a path")
    try:
        escaped_url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        _ = urllib.parse.urlsplit(escaped_url).port  # raises for one that is no port
        return urllib.request.Request(escaped_url, headers={"User-Agent": "staticvl"})
    except ValueError as error:
        raise ImageError(f"{name} is not a valid URL ({shown(error)})") from error


def _fetch(
    request: urllib.request.Request, name: str, timeout_s: float, max_bytes: int, opener: urllib.request.OpenerDirector
) -> bytes:
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return _read(response, name, max_bytes)
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            target = shown(error.headers.get("Location"))
            raise ImageError(
                f"{name} redirects to {target}, which is not followed; expected http or https, without a loop"
            ) from None
        raise ImageError(f"{name} cannot be fetched: HTTP status {error.code} {shown(error.reason)}") from None
    except (TimeoutError, ImageError):
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise ImageError(f"{name} cannot be fetched: {shown(error.reason)}") from error
    except (http.client.HTTPException, OSError, UnicodeError) as error:
        raise ImageError(f"{name} cannot be fetched: {shown(error) or type(error).__name__}") from error


def _opener(connections: _Connections, *, proxies: bool) -> urllib.request.OpenerDirector:
    """An opener for http and https alone: the default one also opens file, ftp and data."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
        _Handler(connections),
        _SecureHandler(connections),
    ]
    if proxies:
        handlers.append(urllib.request.ProxyHandler())
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """The body of a redirect is not read: it may have no end."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        fp.close()
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Handler(urllib.request.HTTPHandler):
    """http over connections of one download."""

    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self.connections = connections

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_kind(http.client.HTTPConnection, self.connections, None), req)


class _SecureHandler(urllib.request.HTTPSHandler):
    """https over connections of one download; the certificate must be the host's of the URL."""

    def __init__(self, connections: _Connections) -> None:
        self.connections, self.context = connections, _certificates()
        super().__init__(context=self.context)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_kind(http.client.HTTPSConnection, self.connections, self.context), req)


def _kind(base: Any, connections: _Connections, context: ssl.SSLContext | None) -> Any:
    """A kind of http.client's connections that `connections` opens; tunnels through a proxy stay http.client's."""

    class Connection(base):
        def connect(self) -> None:
            self.sock = connections.connect((self.host, self.port))
            if self._tunnel_host:
                self._tunnel()
            if context:
                self.sock = context.wrap_socket(self.sock, server_hostname=self._tunnel_host or self.host)

    return Connection


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Made once: each one holds all certificates of the system."""
    return ssl.create_default_context()


def _read(response: http.client.HTTPResponse, name: str, max_bytes: int) -> bytes:
    length = response.headers.get("Content-Length", "")
    parts, size = [], int(length) if length.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
    if size > max_bytes:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    return b"".join(parts)
