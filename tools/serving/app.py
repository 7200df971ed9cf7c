"""The application: its routes, and the answer to a chat completion."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ...runtime.model import Model
from ...runtime.shown import quoted
from .api_keys import KeyRing
from .body_limits import SMALL, check_values
from .connections import EventStream, read_body, unless_gone
from .errors import ApiError, add_handlers
from .page import page_response
from .request_handler import RequestHandler
from .responses import ResponseWriter
from .schema import ChatRequest, read_request
from .service import Service
from .settings import Settings

SAFE = ["GET", "HEAD"]


def create_app(model: Model, settings: Settings) -> FastAPI:
    """An application that serves a model; `app.state.service` exists while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        app.state.service = Service(model, settings)
        watching = asyncio.create_task(app.state.service.newer_artifact.watch())
        yield
        watching.cancel()
        await app.state.service.close()

    # The interactive pages of FastAPI load scripts from elsewhere, so they are left out.
    app = FastAPI(title="staticvl", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_handlers(app)
    _add_routes(app, settings, int(time.time()))
    return app


def _add_routes(app: FastAPI, settings: Settings, created: int) -> None:
    keys = KeyRing(settings.keys)

    def service_of(request: Request) -> Service:
        return request.app.state.service

    @app.api_route("/", methods=SAFE)
    async def page() -> Response:
        return page_response()

    @app.api_route("/health", methods=SAFE)
    async def health(request: Request) -> Response:
        service = service_of(request)
        trouble, note = service.trouble or service.stall, service.newer_artifact.check()
        return JSONResponse({"status": trouble or "ok"} | ({"artifact": note} if note else {}), 503 if trouble else 200)

    @app.api_route("/metrics", methods=SAFE)
    async def metrics(request: Request) -> Response:
        keys.check(request.headers.get("authorization"))
        return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/v1/models", methods=SAFE)
    async def models(request: Request) -> Response:
        keys.check(request.headers.get("authorization"))
        return JSONResponse({"object": "list", "data": [_card(service_of(request), created)]})

    @app.api_route("/v1/models/{name:path}", methods=SAFE)
    async def one_model(request: Request, name: str) -> Response:
        keys.check(request.headers.get("authorization"))
        if name != settings.model_name:
            raise ApiError(
                404,
                f"the model {quoted(name)} is not served here; expected {quoted(settings.model_name)}",
                code="model_not_found",
            )
        return JSONResponse(_card(service_of(request), created))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        keys.check(request.headers.get("authorization"))
        return await _answer(service_of(request), request)


def _card(service: Service, created: int) -> dict[str, object]:
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": created,
        "owned_by": "staticvl",
        "context_length": service.spec.context,
        "family": service.model.info.family,
    }


async def _answer(service: Service, request: Request) -> Response:
    """The answer, whole or as a stream that closes the handler itself."""
    handler = RequestHandler(service)
    try:
        body = await read_body(request, service.settings)
        chat_request, writer = await unless_gone(request.receive, _queued(handler, body))
        if chat_request.stream:
            with_usage = bool(chat_request.stream_options and chat_request.stream_options.include_usage)
            return EventStream(handler.events(writer, with_usage), service.settings.send_s, handler.close)
        answer = await unless_gone(request.receive, handler.whole(writer))
        handler.status = 200
        handler.close()
        return JSONResponse(answer)
    except BaseException as error:
        handler.status = error.status if isinstance(error, ApiError) else 499
        handler.close()
        raise


async def _queued(handler: RequestHandler, body: bytes) -> tuple[ChatRequest, ResponseWriter]:
    check_values(body, handler.service.spec.context)
    chat_request = read_request(body) if len(body) <= SMALL else await asyncio.to_thread(read_request, body)
    return chat_request, await handler.queue(chat_request)
