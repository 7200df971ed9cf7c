"""Errors in the form that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...runtime.artifact import ArtifactError
from ...runtime.async_engine import EngineClosedError
from ...runtime.backends.distributed.failures import RankError
from ...runtime.engine.fit import ContextError
from ...runtime.opening import RunError
from ...runtime.processor.images import ImageError
from ...runtime.sampling.constraints import ConstraintError
from .log_format import brief

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error that is sent to the client, with an HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers)

    @property
    def type(self) -> str:
        return {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ClientGoneError(Exception):
    """The client has closed its connection, or does not read from it."""


def of_request(error: Exception) -> ApiError:
    """The error to send for one that was raised before an answer began; mostly the request is at fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), param="messages", code="invalid_image")
    if isinstance(error, ConstraintError):
        return ApiError(400, str(error), param="response_format", code="invalid_form")
    if isinstance(error, ValueError) and not isinstance(error, ArtifactError):
        return ApiError(400, str(error), code="invalid_value")
    return of_engine(error)


def of_engine(error: Exception) -> ApiError:
    """The error to send for one that was raised while an answer was made; the client gets no details, as it can change
    nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RankError):
        return ApiError(503, "a part of the model is gone, and the server is about to end; try another one", code="rank_failed")
    if isinstance(error, ArtifactError) and not isinstance(error, RunError):
        message = "a file of the model cannot be opened, and the server is about to end; try another one"
        return ApiError(503, message, code="artifact_failed")
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server ends before the answer is complete; try another one", code="unavailable")
    name = secrets.token_hex(4)
    log.error("request %s failed: %s", name, brief(error))
    message = f"the request failed inside the server, whose log says why under {name}; try again"
    return ApiError(500, message, code="internal_error")


def response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


def add_handlers(app: FastAPI) -> None:
    """Make every exception of a route an answer in the API's form."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return response(error)

    async def routing(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = (
            f"{request.method} {request.url.path} is not served here; expected POST /v1/chat/completions or GET /v1/models"
        )
        return response(ApiError(error.status_code, message, code="not_found", headers=error.headers or {}))

    async def gone(*_: object) -> JSONResponse:
        return JSONResponse(None, 499)  # which no client reads

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(ClientGoneError, gone)
    app.add_middleware(_Unexpected)


class _Unexpected:
    """A layer around all routes, which answers exceptions without a handler. A handler for every exception would be called by
    starlette, which then raises it again, and the log gets its traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noting_start)
        except Exception as error:  # of any kind: there is no other handler
            message = of_engine(error)
            if started:
                scope["state"]["abort"]()
            else:
                await response(message)(scope, receive, send)
