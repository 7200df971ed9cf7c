"""A model that is served: admission of requests, health, and the end."""

from __future__ import annotations

import asyncio
import math
import time

from ...runtime.artifact import ArtifactError
from ...runtime.async_engine import AsyncEngine
from ...runtime.model import Model
from .errors import ApiError
from .images import ImageLoader
from .newer_artifact import NewerArtifact
from .server_metrics import ServerMetrics
from .settings import Settings


class Service:
    """The state of a server in its event loop; ended by `close`."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.loop = asyncio.get_running_loop()
        self.failed = asyncio.Event()  # a rank is gone, and the process has to end
        self.engine = AsyncEngine(model)
        self.engine.on_failure = lambda: self.loop.call_soon_threadsafe(self.failed.set)
        self.metrics = ServerMetrics(model.engine)
        self.images = ImageLoader(settings, model.info.image.alpha)
        self.spec = model.artifact.manifest.cache
        self.newer_artifact = NewerArtifact(model.artifact)
        self.draining = False
        self.preparing = asyncio.Lock()  # one request at a time holds decoded images that are not cut into tiles yet
        self._mean_s = 1.0  # seconds that requests take, the latest counting most

    @property
    def trouble(self) -> str | None:
        """The reason why no request is admitted; None while they are."""
        if isinstance(self.engine.failure, ArtifactError):
            return "a file of the model cannot be opened"
        if self.engine.failure is not None:
            return "a part of the model is gone"
        return "the server is shutting down" if self.draining else None

    @property
    def stall(self) -> str | None:
        """The state of an engine that has requests and does not step; None for one that does. Requests may wait meanwhile."""
        seconds = self.engine.turn_s
        return f"the engine has not ended a step for {seconds:.0f} s" if seconds > self.settings.stall_s else None

    @property
    def places(self) -> int:
        """The limit of answers at once: those in slots, and those that wait."""
        return self.spec.slots + self.settings.max_waiting

    def admit(self, count: int = 1) -> None:
        """Admit a request, or more answers of one; raises ApiError, status 503 or 429."""
        if self.trouble:
            raise ApiError(503, f"{self.trouble}; try another one", code="unavailable", headers={"Retry-After": "5"})
        if self.metrics.active + count > self.places:
            seconds = min(max(math.ceil(self._mean_s * self.metrics.active / self.spec.slots / 2), 1), 60)
            message = f"{self.metrics.active} answers run or wait already; try again in {seconds} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        self.metrics.active += count

    def release(self, count: int, seconds: float, status: int) -> None:
        """Count an admitted request as ended, after `seconds` and with an HTTP status."""
        self.metrics.active -= count
        self.metrics.seconds.observe(seconds)
        self.metrics.requests.labels(str(status)).inc()
        self._mean_s += 0.1 * (seconds - self._mean_s)

    async def drain(self, seconds: float) -> None:
        """Admit no more requests and wait until all have ended, at most so many seconds."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.metrics.active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End requests that still run; the model stays open."""
        self.draining = True
        await self.engine.close()
        self.images.close()
