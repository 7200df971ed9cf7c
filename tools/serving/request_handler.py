"""The handling of one request, from its admission to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from ...runtime.async_engine import Answers, Piece
from ...runtime.engine.request import Output
from ...runtime.processor.prompt import Prompt
from .errors import ApiError, of_engine, of_request
from .responses import ResponseWriter
from .schema import ChatRequest
from .service import Service
from .translate import check_request, messages_of, sampling_of

DONE = "[DONE]"


class RequestHandler:
    """One admitted request. `close` must be called however it ends; it cancels answers that are not complete."""

    def __init__(self, service: Service) -> None:
        """Admit the request; raises ApiError where the service refuses it."""
        self.service, self.started = service, time.monotonic()
        self.count, self.status = 0, 499  # unless it is set, the client left
        self.answers: Answers | None = None
        self.outputs: dict[int, Output] = {}
        self.closed = False
        self._admit(1)

    def _admit(self, count: int) -> None:
        self.service.admit(count)
        self.count += count

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.answers is not None:
            self.answers.close()
        self.service.release(self.count, time.monotonic() - self.started, self.status)

    async def queue(self, request: ChatRequest) -> ResponseWriter:
        """Queue a request in the engine, and return a writer of its answers; raises ApiError for one that cannot be
        answered."""
        service = self.service
        try:
            check_request(request, service.settings, service.spec.context, service.places)
            self._admit((request.n or 1) - 1)
            limit = self.started + service.settings.request_s
            async with asyncio.timeout(limit - time.monotonic()):
                prompt = await self._prepare(request)
                params = sampling_of(request, service.model.engine.capacity - prompt.length, limit - time.monotonic())
                self.answers = await service.engine.submit(prompt, params)
                tokens = await asyncio.to_thread(lambda: service.model.processor.token_bytes) if request.logprobs else None
        except TimeoutError:
            raise ApiError(503, "the request was not ready in time; try again", code="timeout") from None
        except Exception as error:  # of any kind: the client gets it in the API's form
            raise of_request(error) from error
        return ResponseWriter(service.settings.model_name, tokens, service.model.info.eos_token_ids)

    async def _prepare(self, request: ChatRequest) -> Prompt:
        service = self.service
        messages, urls = messages_of(request)
        files = await service.images.fetch(urls)
        if not files:
            return await service.engine.prepare(messages)
        async with service.preparing:
            prompt = await service.engine.prepare(messages, await service.images.decode(files))
        await service.images.free(prompt.frames)
        return prompt

    async def _items(self) -> AsyncGenerator[tuple[int, Piece | Output], None]:
        assert self.answers is not None
        metrics, started = self.service.metrics, False
        async for index, item in self.answers:
            if not started:
                metrics.first.observe(time.monotonic() - self.started)
                started = True
            if isinstance(item, Output):
                metrics.generated.inc(len(item.token_ids))
                self.outputs[index] = item
            yield index, item

    async def whole(self, writer: ResponseWriter) -> dict[str, Any]:
        """The body of an answer that is not streamed; raises ApiError."""
        try:
            async for _ in self._items():
                pass
        except Exception as error:
            raise of_engine(error) from error
        return writer.completion(self._in_order())

    async def events(self, writer: ResponseWriter, with_usage: bool) -> AsyncGenerator[dict[str, Any] | str, None]:
        """The chunks of a streamed answer; an error is the last of them."""
        begun: set[int] = set()
        try:
            async for index, item in self._items():
                if index not in begun:
                    begun.add(index)
                    yield writer.first_chunk(index)
                if isinstance(item, Output):
                    yield writer.last_chunk(index, item)
                elif writer.has_content(item):
                    yield writer.chunk(index, item)
        except Exception as error:
            api_error = of_engine(error)
            self.status = api_error.status
            yield api_error.body()
            return
        if with_usage:
            yield writer.usage(self._in_order())
        self.status = 200
        yield DONE

    def _in_order(self) -> list[Output]:
        return [self.outputs[index] for index in sorted(self.outputs)]
