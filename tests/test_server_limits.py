"""One request does not stop the server: what it may hold is bounded, and an engine that stands still is reported."""

from __future__ import annotations

import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from staticvl import runtime
from staticvl.tools.serving.bodies import MOST_VALUES, SMALL, VALUES_PER_TOKEN, check_values
from staticvl.tools.serving.errors import ApiError
from staticvl.tools.serving.main import listening
from staticvl.tools.serving.quiet import LOST_WRITES
from staticvl.tools.serving.schema import ChatRequest, read_request

from .servers import HEAD, TIMEOUT_S, Running, far_model, rest, serving, until

USER = {"role": "user", "content": "Hello!"}
GOOD = {"model": "model", "messages": [USER], "max_tokens": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(far_model(tmp_path_factory.mktemp("limits") / "artifact"), max_waiting=4) as running:
        yield running
        assert running.post(GOOD).status_code == 200


# --- Bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [b"1", b"[]", b"{}", b'""'])
def test_bodies_of_a_million_values_are_not_parsed(item: bytes) -> None:
    most = MOST_VALUES + VALUES_PER_TOKEN * 1000
    body = b'{"messages": [' + b",".join([item] * most) + b"]}"
    with pytest.raises(ApiError, match=rf"about \d+ JSON values; expected at most {most}, so send fewer"):
        check_values(body, 1000)


def test_a_long_text_and_large_images_are_few_values(server: Running) -> None:
    url = "data:image/png;base64," + "A" * 3_000_000
    check_values(json.dumps({"a": "word " * 100_000, "b": [url] * 3}).encode(), 1000)
    # A prompt that fits the context, of nothing but quotation marks and commas.
    check_values(json.dumps({"a": '",' * server.service.spec.context}).encode(), server.service.spec.context)
    check_values(b"[" * SMALL, 1000)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": [1] * 4000}, r"messages\[0\]: Input should be an object"),
    ({"messages": [{}] * 4000}, r"messages\[0\].role: Field required"),
    ({"messages": [USER] * 5000}, "at most 4096 items"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2000}]}, "at most 1024 items"),
    (
        {"logit_bias": dict.fromkeys(map(str, range(20_000)), "x")},
        "logit_bias: .*20000 tokens are named; expected at most 1024",
    ),
    ({"stop": ["a"] * 20_000}, "stop: .*at most 16 items"),
    ({"stop": "a" * 1001}, r"stop\[0\]: .*at most 1000 characters"),
    ({"stop_token_ids": [1] * 20_000}, "stop_token_ids: .*at most 64 items"),
    ({"max_tokens": 10**30}, "max_tokens: .*less than 2147483648"),
    ({"top_k": 2**31}, "top_k: .*less than 2147483648"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs: .*less than or equal to 20"),
    ({f"key{i}": 1 for i in range(5000)}, "the fields key0, key1, key2, key3, key4 and 4995 more cannot be used"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_each_field_has_a_limit_that_the_error_names(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        read_request(json.dumps(GOOD | change).encode())
    assert caught.value.status == 400 and len(caught.value.message) < 300


@pytest.mark.parametrize("change", [change for change, _ in WRONG[:-1]], ids=range(len(WRONG) - 1))
def test_faults_after_the_first_are_not_collected(change: dict[str, Any]) -> None:
    """pydantic collects all of them, each with its input, unless it is told to stop. One message may lack two fields."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(json.dumps(GOOD | change))
    assert caught.value.error_count() <= 2


def test_more_answers_than_can_ever_be_here(server: Running) -> None:
    """Waiting would not help: 4 slots and 4 that wait."""
    error = server.post(GOOD | {"n": 9})
    assert error.status_code == 400
    assert error.json()["error"]["message"] == "n is 9, but this server holds at most 8 answers at once; give a smaller n"
    assert server.post(GOOD | {"n": 8}).status_code == 200


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "a" * 10_001}, "regex: String should have at most 10000 characters"),
        ({"choice": ["a" * 40] * 1000}, "choice has 40000 characters; expected at most 32768"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "a" * 40_000}}}}, "at most 32768"),
    ],
)
def test_forms_that_are_too_large(server: Running, form: dict[str, Any], message: str) -> None:
    response = server.post(GOOD | form)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


# --- An engine that stands still ---------------------------------------------------------------------------------------


def test_an_engine_that_does_not_step_is_reported(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    device, clock = model.engine.backend.run, model.engine.clock
    stuck, free, late = threading.Event(), threading.Event(), [0.0]
    model.engine.clock = lambda: clock() + late[0]

    def run(*args: Any) -> Any:
        stuck.set()
        free.wait(TIMEOUT_S)
        return device(*args)

    model.engine.backend.run = run  # type: ignore[method-assign]
    with serving(model, stall_s=60) as server:
        late[0] = 1000.0
        assert server.http.get("/health").status_code == 200, "nothing runs"
        connection = server.begin(max_tokens=3)
        stuck.wait()
        assert server.http.get("/health").json() == {"status": "ok"}
        late[0] += 75.4
        health = server.http.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "the engine has not ended a step for 75 s"})
        free.set()
        assert b"200 OK" in connection.recv(1000)
        connection.close()
        until(lambda: server.http.get("/health").status_code == 200)


# --- Connections -------------------------------------------------------------------------------------------------------


def test_answers_are_not_held_back() -> None:
    """Without TCP_NODELAY the end of an answer waits for the client's delayed acknowledgement."""
    import asyncio

    async def accepted() -> int:
        came: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                came.set_result(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with listening("127.0.0.1", 0) as sock:
            listener = await asyncio.get_running_loop().create_server(Protocol, sock=sock)
            with socket.create_connection(sock.getsockname()):
                set_on = await came
            listener.close()
            return set_on

    assert asyncio.run(accepted())


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/model"])
def test_head_is_get_without_its_body(server: Running, path: str) -> None:
    head, whole = server.http.head(path), server.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",  # a handshake of TLS
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    HEAD + b"Content-Length: -5\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
]


@pytest.mark.parametrize("data", NO_HTTP, ids=range(len(NO_HTTP)))
def test_what_is_no_http_is_told_so(server: Running, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    connection = server.connect()
    connection.sendall(data)
    head, _, body = rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    assert [record.exc_info for record in caplog.records if record.levelno >= logging.WARNING] == [None]


def test_however_a_client_leaves_the_log_has_no_traceback(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(upgrade)
        assert b"200 OK" in connection.recv(1000)
    # Answered by its head alone; what follows cannot be answered any more.
    with server.connect() as connection:
        head = HEAD.replace(b"application/json", b"text/plain") + b"Transfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        assert b" 415 " in connection.recv(1000)
        connection.sendall(b"ZZ\r\n")
        rest(connection)
    for stream in (True, False):
        connection = server.begin(stream=stream, max_tokens=2000, ignore_eos=True)
        until(lambda: server.service.figures.active == 1)
        _reset(connection)
        until(lambda: server.service.figures.active == 0)
    for data in (b"", b"POST /v1", HEAD + b"Content-Length: 100\r\n\r\n{"):
        connection = server.connect()
        connection.sendall(data)
        _reset(connection)
    assert server.http.get("/health").status_code == 200
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(record.exc_info is None and "\n" not in record.getMessage() for record in loud)
    assert [record.name for record in loud] == ["uvicorn.error"], "the body that was no chunk"
    logging.getLogger("asyncio").warning(LOST_WRITES)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_what_nobody_expected_is_one_line_and_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model) as server:
        monkeypatch.setattr("staticvl.tools.serving.app._card", lambda *_: 1 / 0)
        monkeypatch.setattr(runtime.Processor, "prompt", lambda *_: {}["secret"])
        requests = (
            lambda: server.http.get("/v1/models"),
            lambda: server.post(GOOD),
            lambda: server.post(GOOD | {"stream": True}),
        )
        for request in requests:
            response = request()
            assert response.status_code == 500
            message = response.json()["error"]["message"]
            [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
            name = message.partition("under ")[2][:8]
            assert record.getMessage().startswith(f"request {name} failed: ") and len(name) == 8
            assert record.exc_info is None and "\n" not in record.getMessage()
            assert "secret" not in message and "zero" not in message
            caplog.clear()
        monkeypatch.undo()
        server.service.loop.call_soon_threadsafe(lambda: 1 / 0)
        assert server.post(GOOD).status_code == 200
        [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert record.exc_info is None and "ZeroDivisionError: division by zero" in record.getMessage()
