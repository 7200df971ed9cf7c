"""A server in a thread of the test's process, at a port of its own."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
from PIL import Image

from staticvl import runtime
from staticvl.compiler.plan import Buckets
from staticvl.runtime.artifact import RopeParameters
from staticvl.tools.serving.main import Server, listening
from staticvl.tools.serving.service import Service
from staticvl.tools.serving.settings import Settings

from .conftest import EMBEDDED
from .fakes import fake_model

TIMEOUT_S = 30.0  # that something may take on a busy machine before a test gives up
LONG = Buckets(prefill=(8, 32, 512), decode=(1, 2, 4), vision=(1, 2), context=12_000, slots=4)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
FAR = RopeParameters(theta=1e9)  # so that the fake backend can tell that many positions apart


class Running:
    """A server that runs, and ways to talk to it."""

    def __init__(self, model: runtime.Model, server: Server, port: int) -> None:
        self.model, self.server, self.port = model, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)

    @property
    def service(self) -> Service:
        return self.server.service

    def client(self, key: str = "none") -> openai.OpenAI:
        own = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=own)

    def chat(self, *messages: Any, **settings: Any) -> Any:
        """An answer by OpenAI's client, or the list of its chunks; a text is a message of the user."""
        sent_messages = [as_message(message) for message in messages]
        with self.client() as client:
            answer = client.chat.completions.create(model="model", messages=sent_messages, **settings)
            return list(answer) if settings.get("stream") else answer

    def post(self, content: Any, **headers: str) -> httpx.Response:
        """A body as it is: bytes, a generator of bytes (sent in chunks), or something that becomes JSON."""
        data = content if isinstance(content, bytes) or hasattr(content, "__next__") else json.dumps(content).encode()
        return self.http.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"} | headers)

    def figure(self, name: str) -> float:
        """A value of /metrics; a counter that was never counted is 0."""
        lines = self.http.get("/metrics").text.splitlines()
        return float(next((line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")), 0))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S)

    def begin(self, **request: Any) -> socket.socket:
        """A request whose answer is not read yet."""
        connection = self.connect()
        send_request(connection, request)
        return connection


def send_request(connection: socket.socket, request: dict[str, Any]) -> None:
    """POST a request; where it has no messages, it says Hello."""
    body = json.dumps({"model": "model", "messages": [as_message("Hello!")], **request}).encode()
    connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


def rest(connection: socket.socket) -> bytes:
    """What still arrives before the connection ends."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return b"".join(parts)


def as_message(given: Any) -> Any:
    return {"role": "user", "content": given} if isinstance(given, str) else given


def asking(text: str, *urls: str) -> dict[str, Any]:
    """A message of the user with images."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def until(true: Callable[[], object]) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(model: runtime.Model, **settings: Any) -> Iterator[Running]:
    """At the end nothing may be left: no request, no slot, no thread of the engine."""
    sock = listening("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of every connection: what is not read is soon felt
    server = Server(model, Settings(**{"model_name": "model", **settings}))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    running = Running(model, server, sock.getsockname()[1])
    try:
        yield running
        until(lambda: running.service.metrics.active == 0)
        if running.service.engine.failure is None:
            until(lambda: model.engine.cache.free == model.engine.cache.spec.slots)
            until(lambda: model.engine.scheduler.idle and not running.service.engine._answers)
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def slow_down(model: runtime.Model, seconds: float = 0.01) -> None:
    """A device that takes its time, so that a long answer is not over before something happens."""
    device = model.engine.backend.run

    def run(*args: Any) -> Any:
        time.sleep(seconds)
        return device(*args)

    model.engine.backend.run = run  # type: ignore[method-assign]


def far_model(folder: Path) -> runtime.Model:
    """A fake with room for ten thousand tokens."""
    checkpoint = folder.with_name("checkpoint")
    shutil.copytree(EMBEDDED, checkpoint, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = LONG.context
    (checkpoint / "config.json").write_text(json.dumps(config))
    return fake_model(checkpoint, folder, LONG, reuse=True, rope=FAR)
