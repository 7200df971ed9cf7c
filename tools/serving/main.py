"""`staticvl serve`: the server's process, from the command line to its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from ... import runtime
from ...runtime.artifact import ArtifactError, read_manifest
from ...runtime.engine.blocks import tokens_in
from ...runtime.engine.engine import Engine
from ..show import CODE
from .api_keys import collect_keys
from .app import create_app
from .arguments import settings_of
from .connections import protocol_with
from .log_format import log_in_one_line
from .service import Service
from .settings import Settings

LOCAL = ("127.0.0.1", "::1", "localhost")
LEAVE_S = 5  # for connections to end once all answers have


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args, collect_keys(args.api_key, args.api_key_file, os.environ))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if not settings.keys and args.host not in LOCAL:
        print(f"every client of {args.host} is served, because no API key was given (--api-key-file)", file=sys.stderr)
    with (
        listening(args.host, args.port) as sock,
        warned_of_code(args.artifact, args.verify_key),
        runtime.load(
            args.artifact,
            device=args.device,
            tp=args.tp,
            threads=args.threads,
            prefill_budget=args.prefill_budget,
            reuse=not args.no_reuse,
            speculate=args.speculate,
            image_cache_mb=args.image_cache_mb,
            cache_gb=args.cache_gb,
            request_log=args.request_log,
            system_in_user=args.system_in_user,
            verify=args.verify,
            verify_key=args.verify_key,
        ) as model,
    ):
        model.open_graphs()  # so that errors of opening are known before the first request
        return serve(model, settings, sock)


@contextlib.contextmanager
def warned_of_code(folder: Path, key: Path | None) -> Iterator[None]:
    """Warn before anything of an artifact with code in it is run. Errors of the artifact are left to its loading."""
    with contextlib.suppress(ArtifactError):
        if read_manifest(folder).ascend is not None and key is None:
            print(f"staticvl: {folder} holds {CODE}", file=sys.stderr)
    yield


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address; raises OSError with a sentence. Taken before the model is loaded, so that a port in use is
    known at once."""
    try:
        (family, *_, place), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        server = socket.create_server(place[:2], family=family, backlog=1024)
        # asyncio sets TCP_NODELAY only on sockets that are TCP's by number. Without it the end of each answer waits 40 ms.
        return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=server.detach())
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port} ({error}); give another --host or --port") from error


def serve(model: runtime.Model, settings: Settings, sock: socket.socket) -> int:
    """Serve until a signal or a failed rank ends it; the exit status."""
    server = Server(model, settings)
    host, port = sock.getsockname()[:2]
    if model.engine.budget.bounded or model.engine.budget.paged:
        print(f"staticvl: {cache_line(model.engine)}", file=sys.stderr)
    print(f"serving {settings.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server.run([sock])
    return server.status


def cache_line(engine: Engine) -> str:
    """What the cache may hold, for people."""
    budget, slots = engine.budget, engine.cache.spec.slots
    blocks = f"{budget.blocks} {'pages' if budget.paged else 'blocks'} of {tokens_in(1)} tokens"
    return f"{slots} slots share {blocks}, {budget.gigabytes:.3g} GB of keys and values"


class Server(uvicorn.Server):
    """uvicorn's server, which drains: after the first signal no request is admitted, and it ends when all have ended; at the
    second it ends at once."""

    def __init__(self, model: runtime.Model, settings: Settings) -> None:
        self.app, self.settings, self.status = create_app(model, settings), settings, 0
        config = uvicorn.Config(
            self.app,
            http=protocol_with(settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=LEAVE_S,
        )
        super().__init__(config)
        self._signals = 0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def service(self) -> Service:
        return self.app.state.service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        log_in_one_line(asyncio.get_running_loop())
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._watch()))

    async def _watch(self) -> None:
        """End with an error when a rank has failed, since the model then answers no request."""
        await self.service.failed.wait()
        print(f"staticvl: {self.service.engine.failure}", file=sys.stderr)
        self.status = 1
        await asyncio.sleep(0.5)  # time for waiting clients, and /health, to get the error
        self.should_exit = True

    async def _drain(self) -> None:
        """Let admitted requests finish, then end."""
        active = self.service.metrics.active
        if active:
            print(f"staticvl: ends when {active} answers have, in {self.settings.drain_s:g} s at most", file=sys.stderr)
        await self.service.drain(self.settings.drain_s)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Clients that still wait get an error before their connections close.
        await self.service.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal, between two instructions of the loop's thread."""
        self._signals += 1
        if self._signals > 1 or not self.started:
            print("staticvl: ends at once", file=sys.stderr)
            os._exit(128 + sig)
        asyncio.get_running_loop().call_soon_threadsafe(self.begin_to_end)

    def begin_to_end(self) -> None:
        """Drain, then end; to be called in the loop's thread."""
        self._tasks.append(asyncio.get_running_loop().create_task(self._drain()))
