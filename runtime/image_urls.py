"""Pictures behind URLs, as bytes: data: URLs, and downloads whose size, time and connections are bounded."""

from __future__ import annotations

import base64
import binascii
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
from typing import TypeAlias

MIB = 1 << 20
Connect: TypeAlias = Callable[[tuple[str, int], float | None], socket.socket]


class ImageError(ValueError):
    """A picture that cannot be used; the message says which one and why."""


def short_name(url: str) -> str:
    """A URL as messages call it."""
    return url if len(url) <= 100 else f"{url[:97]}..."


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data:image/...;base64 URL; raises ImageError for any other, and for more than max_bytes."""
    name = short_name(url)
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise ImageError(f"{name} is not a picture; expected data:image/...;base64,...")
    if len(body) * 3 // 4 > max_bytes + 2:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64 ({error})") from error


def download(url: str, *, timeout_s: float, max_bytes: int, connect: Connect | None = None) -> bytes:
    """What lies at an http(s) URL; raises ImageError.

    `timeout_s` is the time that all of it may take, redirects included. `connect` (address, timeout in seconds) opens every
    connection, to hosts of redirects too, and may refuse one with ImageError; then no proxy is asked, since that would choose
    the address. By default any address is reached, by the environment's proxies where it names some.
    """
    name = short_name(url)
    request = _request(url, name)
    result: Future[bytes] = Future()

    # In a thread of its own: a socket timeout bounds one read, not a server that sends a byte now and then.
    def work() -> None:
        try:
            result.set_result(_fetch(request, name, timeout_s, max_bytes, _opener(connect)))
        except Exception as error:  # handed over to the caller, who sees it as it is
            result.set_exception(error)

    threading.Thread(target=work, daemon=True, name="staticvl-download").start()
    try:
        return result.result(timeout=timeout_s)
    except TimeoutError:
        raise ImageError(f"{name} did not arrive within {timeout_s:g} s") from None


def _request(url: str, name: str) -> urllib.request.Request:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(f"{name} has the scheme {scheme}; expected http or https, or a path")
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        _ = urllib.parse.urlsplit(quoted).port  # raises for one that is no port
        return urllib.request.Request(quoted, headers={"User-Agent": "staticvl"})
    except ValueError as error:
        raise ImageError(f"{name} is not a valid URL ({error})") from error


def _fetch(
    request: urllib.request.Request, name: str, timeout_s: float, max_bytes: int, opener: urllib.request.OpenerDirector
) -> bytes:
    deadline = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return _read(response, name, deadline, max_bytes)
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            target = error.headers.get("Location")
            raise ImageError(
                f"{name} redirects to {target}, which is not followed; expected http or https, without a loop"
            ) from None
        raise ImageError(f"{name} cannot be fetched: HTTP status {error.code} {error.reason}") from None
    except (TimeoutError, ImageError):
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise ImageError(f"{name} cannot be fetched: {error.reason}") from error
    except (http.client.HTTPException, OSError, UnicodeError) as error:
        raise ImageError(f"{name} cannot be fetched: {error or type(error).__name__}") from error


def _opener(connect: Connect | None) -> urllib.request.OpenerDirector:
    """An opener for http and https alone: the default one also opens file, ftp and data."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ]
    if connect is None:
        handlers += [urllib.request.ProxyHandler(), urllib.request.HTTPHandler()]
        handlers += [urllib.request.HTTPSHandler(context=_certificates())]
    else:
        handlers += [_Handler(connect), _SecureHandler(connect)]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class _Handler(urllib.request.HTTPHandler):
    """http over connections that `connect` opens."""

    def __init__(self, connect: Connect) -> None:
        super().__init__()
        self.connect = connect

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        connect = self.connect

        class Connection(http.client.HTTPConnection):
            def connect(self) -> None:
                self.sock = connect((self.host, self.port), self.timeout)

        return self.do_open(Connection, req)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Made once: each one holds all certificates of the system."""
    return ssl.create_default_context()


class _SecureHandler(urllib.request.HTTPSHandler):
    """https over connections that `connect` opens; the certificate must be the host's of the URL."""

    def __init__(self, connect: Connect) -> None:
        self.connect, self.context = connect, _certificates()
        super().__init__(context=self.context)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        connect, context = self.connect, self.context

        class Connection(http.client.HTTPSConnection):
            def connect(self) -> None:
                self.sock = context.wrap_socket(connect((self.host, self.port), self.timeout), server_hostname=self.host)

        return self.do_open(Connection, req)


def _read(response: http.client.HTTPResponse, name: str, deadline: float, max_bytes: int) -> bytes:
    length = response.headers.get("Content-Length", "")
    parts, size = [], int(length) if length.isdecimal() else 0
    if size <= max_bytes:
        size = 0
        while part := response.read1(65536):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                break
            if time.monotonic() > deadline:
                raise TimeoutError
    if size > max_bytes:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    return b"".join(parts)
