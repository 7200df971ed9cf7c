"""Clients that leave, that do not read, that come while the server ends: no slot is lost, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from staticvl import runtime
from staticvl.runtime import RankError

from .fakes import noise
from .servers import HEAD, TIMEOUT_S, Running, asking, data_url, far_model, rest, send_request, serving, slow_down, until

LONG = {"max_tokens": 5000, "ignore_eos": True}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Running]:
    """A server whose device takes its time."""
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    with serving(model) as running:
        yield running


def answering(model: runtime.Model, count: int = 1) -> Callable[[], bool]:
    return lambda: sum(len(each.generated) > 2 for each in list(model.engine.scheduler.running)) == count


def cancelled(server: Running) -> int:
    return server.model.engine.metrics.finished["cancelled"]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_a_slot(slow: Running, stream: bool) -> None:
    """Also with several answers, and while waiting for a slot; others get theirs."""
    connections = [slow.begin(stream=stream, n=2, **LONG) for _ in range(3)]  # two in slots, one waits
    until(answering(slow.model, 4))
    for connection in connections:
        connection.close()
    until(lambda: cancelled(slow) == 6)
    assert slow.chat("Hello!", max_tokens=3).choices[0].finish_reason == "length"
    assert slow.figure('staticvl_requests_total{status="499"}') == 3


def test_who_leaves_while_a_body_arrives_or_is_made_ready(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        until(lambda: slow.service.figures.active == 1)
    until(lambda: slow.service.figures.active == 0)
    go, prompt = threading.Event(), runtime.Processor.prompt

    def patiently(*args: Any) -> Any:
        go.wait(TIMEOUT_S)
        return prompt(*args)

    monkeypatch.setattr(runtime.Processor, "prompt", patiently)
    with slow.begin(**LONG):
        until(lambda: slow.service.figures.active == 1)
    until(lambda: slow.service.figures.active == 0)
    go.set()
    assert slow.chat("Hello!", max_tokens=3).usage.completion_tokens == 3
    assert sum(slow.model.engine.metrics.finished.values()) == 1


def test_openai_clients_that_close_a_stream(slow: Running) -> None:
    with slow.client() as client:
        stream = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "x"}], stream=True, extra_body=LONG
        )
        for _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        until(lambda: cancelled(slow) == 1)


def test_who_does_not_read(tmp_path: Path) -> None:
    """Their answers are made and their slots go to others; then they are dropped, and what was kept for them with them."""
    model = far_model(tmp_path / "artifact")
    with serving(model, send_s=0.5) as server:
        stuck = [narrow(server) for _ in range(6)]
        request = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 300, "ignore_eos": True}
        for connection in stuck:
            send_request(connection, request)
        until(lambda: sum(model.engine.metrics.finished.values()) == 6)  # slots are not held by them
        wanted = far_answers(tmp_path / "other", [f"Hello {i}!" for i in range(8)])
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda i: server.chat(f"Hello {i}!", max_tokens=9).choices[0].message.content, range(8)))
        assert got == wanted
        until(lambda: server.service.figures.active == 0)
        until(lambda: not server.server.server_state.connections)  # though what they were sent is still unread
        for connection in stuck:
            assert b"[DONE]" not in rest(connection)


def narrow(server: Running) -> socket.socket:
    """A connection that takes little before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(TIMEOUT_S)
    connection.connect(("127.0.0.1", server.port))
    return connection


def far_answers(folder: Path, prompts: list[str]) -> list[str]:
    return [out.text for out in far_model(folder / "artifact").generate(prompts, max_new_tokens=9)]


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model) as server:
        connection = narrow(server)
        send_request(connection, {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 300, "ignore_eos": True})
        until(lambda: sum(model.engine.metrics.finished.values()) == 1)  # long before it was read
        got = bytearray()
        while b"[DONE]" not in got:
            got += connection.recv(20_000)
        connection.close()
        events = [json.loads(line[6:]) for line in got.splitlines() if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        [wanted] = far_model(tmp_path / "other" / "artifact").generate(["Hello!"], max_new_tokens=300, ignore_eos=True)
        assert text == wanted.text


def test_images_hold_up_no_stream(slow: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one prompt is being made ready, and it takes for ever, others are answered: the loop is free."""
    go = threading.Event()
    decode = slow.service.images._decode
    monkeypatch.setattr(slow.service.images, "_decode", lambda *args: (go.wait(TIMEOUT_S), decode(*args))[1])
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(slow.chat, asking("What?", data_url(noise(1))), max_tokens=3)
        until(lambda: slow.service.figures.active == 1)
        assert len(slow.chat("Hello!", max_tokens=3, stream=True)) >= 2
        assert not held.done()
        go.set()
        assert held.result(TIMEOUT_S).usage.completion_tokens == 3


def test_draining(tmp_path: Path) -> None:
    """Who is here finishes, who comes is sent away, then the server ends by itself."""
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        held: Future[Any] = pool.submit(server.chat, "Hello!", max_tokens=100, extra_body={"ignore_eos": True})
        until(answering(model))
        server.service.loop.call_soon_threadsafe(server.server.begin_to_end)
        until(lambda: server.service.draining)
        response = server.post({"model": "model", "messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 503
        assert "shutting down" in response.json()["error"]["message"]
        assert server.http.get("/health").status_code == 503
        assert held.result(TIMEOUT_S).usage.completion_tokens == 100
        until(lambda: server.server.should_exit)


def test_draining_ends_in_time(tmp_path: Path) -> None:
    """Those who are not finished by then are told so."""
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    with serving(model, drain_s=0.2) as server:
        streamed, whole = server.begin(stream=True, **LONG), server.begin(**LONG)
        until(answering(model, 2))
        server.service.loop.call_soon_threadsafe(server.server.begin_to_end)
        assert b"ends before the answer is complete" in rest(streamed)
        assert b" 503 " in rest(whole).splitlines()[0]


def test_a_rank_that_dies_ends_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = far_model(tmp_path / "artifact")

    def dying(*_: Any) -> Any:
        raise RankError("rank 1 died")

    with serving(model) as server:
        monkeypatch.setattr(model.engine.backend, "run", dying)
        with pytest.raises(openai.InternalServerError) as raised:
            server.chat("Hello!")
        assert raised.value.status_code == 503
        assert server.service.trouble == "a part of the model is gone"
        until(lambda: server.server.should_exit)
        assert server.server.status == 1
