"""One request, from the moment that it is let in until it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from ...runtime.async_engine import Answers, Piece
from ...runtime.engine.request import Output
from ...runtime.processor.prompt import Prompt
from .answers import Wording
from .errors import ApiError, of_engine, of_request
from .schema import ChatRequest
from .service import Service
from .translate import check_request, messages_of, sampling_of

DONE = "[DONE]"


class Visit:
    """Close it, however it ends: that cancels what has not."""

    def __init__(self, service: Service) -> None:
        """Raises ApiError where nobody is let in."""
        self.service, self.started = service, time.monotonic()
        self.count, self.status = 0, 499  # unless somebody says otherwise, the client left
        self.answers: Answers | None = None
        self.outputs: dict[int, Output] = {}
        self.closed = False
        self._enter(1)

    def _enter(self, count: int) -> None:
        self.service.enter(count)
        self.count += count

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.answers is not None:
            self.answers.close()
        self.service.leave(self.count, time.monotonic() - self.started, self.status)

    async def ask(self, request: ChatRequest) -> Wording:
        """Queue a request that can be answered; raises ApiError for any other."""
        service = self.service
        try:
            check_request(request, service.settings, service.spec.context, service.places)
            self._enter((request.n or 1) - 1)
            limit = self.started + service.settings.request_s
            async with asyncio.timeout(limit - time.monotonic()):
                prompt = await self._prepared(request)
                params = sampling_of(request, service.spec.context - prompt.length, limit - time.monotonic())
                self.answers = await service.engine.ask(prompt, params)
                tokens = await asyncio.to_thread(lambda: service.model.processor.token_bytes) if request.logprobs else None
        except TimeoutError:
            raise ApiError(503, "the request was not ready in time; try again", code="timeout") from None
        except Exception as error:  # whichever, the client is told in its own words
            raise of_request(error) from error
        return Wording(service.settings.model_name, tokens, service.model.info.eos_token_ids)

    async def _prepared(self, request: ChatRequest) -> Prompt:
        service = self.service
        messages, urls = messages_of(request)
        files = await service.images.fetched(urls)
        if not files:
            return await service.engine.prepare(messages)
        async with service.ready:
            prompt = await service.engine.prepare(messages, await service.images.decoded(files))
        await service.images.forget(prompt.frames)
        return prompt

    async def _items(self) -> AsyncGenerator[tuple[int, Piece | Output], None]:
        assert self.answers is not None
        figures, waited = self.service.figures, False
        async for index, item in self.answers:
            if not waited:
                figures.first.observe(time.monotonic() - self.started)
                waited = True
            if isinstance(item, Output):
                figures.generated.inc(len(item.token_ids))
                self.outputs[index] = item
            yield index, item

    async def whole(self, wording: Wording) -> dict[str, Any]:
        """The body of an answer that is not streamed; raises ApiError."""
        try:
            async for _ in self._items():
                pass
        except Exception as error:
            raise of_engine(error) from error
        return wording.completion(self._in_order())

    async def events(self, wording: Wording, with_usage: bool) -> AsyncGenerator[dict[str, Any] | str, None]:
        """The chunks of a streamed answer; an error is the last of them."""
        opened: set[int] = set()
        try:
            async for index, item in self._items():
                if index not in opened:
                    opened.add(index)
                    yield wording.opening(index)
                if isinstance(item, Output):
                    yield wording.ending(index, item)
                elif wording.says_something(item):
                    yield wording.piece(index, item)
        except Exception as error:
            told = of_engine(error)
            self.status = told.status
            yield told.body()
            return
        if with_usage:
            yield wording.usage(self._in_order())
        self.status = 200
        yield DONE

    def _in_order(self) -> list[Output]:
        return [self.outputs[index] for index in sorted(self.outputs)]
