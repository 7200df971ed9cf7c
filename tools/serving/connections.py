"""Connections with time limits: requests must arrive, answers must be read, and a client that leaves ends its work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import h11
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError, ClientGoneError
from .settings import Settings

T = TypeVar("T")


def protocol_with(settings: Settings) -> type[H11Protocol]:
    """uvicorn's protocol with two more time limits: until a connection's first request, and until the client has read the end
    of an answer. `abort` in a request's state drops the connection with all that is not sent. Bytes that are
    not HTTP get an error in the API's form, or the end of the connection where an answer has begun."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.app_state = {**self.app_state, "abort": transport.abort}
            self.head_timer: asyncio.TimerHandle | None = None
            self.timer: asyncio.TimerHandle | None = None
            self._limit_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._limit_head()

        def _limit_head(self) -> None:
            """A head that has begun must end in time, also after requests that were answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel_head_limit()
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(settings.header_s, self.transport.abort)

        def _cancel_head_limit(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

        def send_400_response(self, msg: str) -> None:
            data = msgspec.json.encode(ApiError(400, f"{msg} Expected HTTP/1.1.", code="invalid_http").body())
            headers = [("content-type", "application/json"), ("content-length", str(len(data))), ("connection", "close")]
            try:
                head = self.conn.send(h11.Response(status_code=400, headers=headers, reason=b"Bad Request"))
            except h11.LocalProtocolError:  # it comes after the request that is answered
                self.transport.abort()
                return
            self.transport.write((head or b"") + data)
            self.transport.close()

        def _unsupported_upgrade_warning(self) -> None:
            """No line in the log for an upgrade that is not offered; the request is answered without it."""

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.timer = self.loop.call_later(settings.send_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel_head_limit()  # the timer would keep the connection in memory until it fires
            if self.timer is not None:
                self.timer.cancel()

    return Protocol


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body of a request; raises ApiError where it is no JSON by its type, larger than allowed, or slow."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(
            415, f"the body has the type {content_type[:60] or 'none'}; expected application/json", code="invalid_type"
        )
    limit = settings.max_body_bytes
    too_large = ApiError(
        413, f"the body has more than the {limit} bytes allowed; send smaller images, or fewer", code="request_too_large"
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_s:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves; then raises ClientGoneError.

    `receive` is that of a request whose body was read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events, which are made no faster than the client reads them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any] | str, None], send_s: float, on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.send_s, self.on_end = events, send_s, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except TimeoutError:
            scope["state"]["abort"]()
        except ClientGoneError:
            pass
        finally:
            self.on_end()

    async def _send_all(self, send: Send) -> None:
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                data = event.encode() if isinstance(event, str) else msgspec.json.encode(event)
                await self._send(send, {"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b""})
        finally:
            await self.events.aclose()

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self.send_s):
            await send(message)
