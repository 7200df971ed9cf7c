"""A model that is served: who is let in, and how it ends."""

from __future__ import annotations

import asyncio
import math
import time

from ...runtime.artifact import ArtifactError
from ...runtime.async_engine import AsyncEngine
from ...runtime.model import Model
from .errors import ApiError
from .figures import Figures
from .images import Images
from .newer import Newer
from .settings import Settings


class Service:
    """Made where a loop runs, ended by `close`."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.loop = asyncio.get_running_loop()
        self.failed = asyncio.Event()  # a rank is gone, and the process has to end
        self.engine = AsyncEngine(model)
        self.engine.on_failure = lambda: self.loop.call_soon_threadsafe(self.failed.set)
        self.figures = Figures(model.engine)
        self.images = Images(settings, model.info.image.alpha)
        self.spec = model.artifact.manifest.cache
        self.newer = Newer(model.artifact)
        self.draining = False
        self.ready = asyncio.Lock()  # one request at a time holds decoded images that are not cut yet
        self._mean_s = 1.0  # that requests take, the latest counting most

    @property
    def trouble(self) -> str | None:
        """Why nobody is let in, if so."""
        if isinstance(self.engine.failure, ArtifactError):
            return "a file of the model cannot be opened"
        if self.engine.failure is not None:
            return "a part of the model is gone"
        return "the server is shutting down" if self.draining else None

    @property
    def stall(self) -> str | None:
        """What is wrong with an engine that has requests and does not step, if it is so; requests may wait meanwhile."""
        seconds = self.engine.turn_s
        return f"the engine has not ended a step for {seconds:.0f} s" if seconds > self.settings.stall_s else None

    @property
    def places(self) -> int:
        """Answers that can be here at once: in slots, and those that wait."""
        return self.spec.slots + self.settings.max_waiting

    def enter(self, count: int = 1) -> None:
        """Let in a request, or so many more answers of one; raises ApiError, status 503 or 429."""
        if self.trouble:
            raise ApiError(503, f"{self.trouble}; try another one", code="unavailable", headers={"Retry-After": "5"})
        if self.figures.active + count > self.places:
            seconds = min(max(math.ceil(self._mean_s * self.figures.active / self.spec.slots / 2), 1), 60)
            told = f"{self.figures.active} answers run or wait already; try again in {seconds} s"
            raise ApiError(429, told, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        self.figures.active += count

    def leave(self, count: int, seconds: float, status: int) -> None:
        """A request that was let in has ended."""
        self.figures.active -= count
        self.figures.seconds.observe(seconds)
        self.figures.requests.labels(str(status)).inc()
        self._mean_s += 0.1 * (seconds - self._mean_s)

    async def drain(self, seconds: float) -> None:
        """Let nobody in any more and wait until all have left, at most so many seconds."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.figures.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End what still runs; the model stays open."""
        self.draining = True
        await self.engine.close()
        self.images.close()
