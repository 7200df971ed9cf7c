"""What a server refuses: each time with a status and a sentence in the API's form, and it goes on serving others."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from staticvl import runtime
from staticvl.tools.cli import main
from staticvl.tools.serving.api_keys import KeyRing, collect_keys

from .servers import HEAD, Running, asking, far_model, serving, slow_down, until

USER = {"role": "user", "content": "Hello!"}
GOOD = {"model": "model", "messages": [USER], "max_tokens": 3}
FORM = {"type": "json_schema"}
DEEP = b'{"model": "model", "messages": ' + b"[" * 50_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = far_model(tmp_path_factory.mktemp("errors") / "artifact")
    with serving(model, max_body_bytes=200_000, body_s=0.5, max_waiting=4) as running:
        yield running
        assert running.post(GOOD).status_code == 200


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, whose form is the API's."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


BROKEN: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"hello", "not valid JSON"),
    (b"\x00\x01\xff", "not valid JSON"),
    (b'{"model": "model"', "not valid JSON"),
    (b'{"model": "model", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid JSON"),
    (rb'{"model": "model", "messages": [{"role": "user", "content": "\ud800"}]}', "hex escape"),
    (rb'{"model": "model", "messages": [{"role": "user", "content": "a \udc00 b"}]}', "hex escape"),
    (b'{"model": "model", "messages": [{"role": "user", "content": "a\x00b"}]}', "control character"),
    (DEEP, "recursion limit"),
    (b"[]", "the body: "),
    (b"null", "the body: "),
]


@pytest.mark.parametrize(("body", "message"), BROKEN, ids=range(len(BROKEN)))
def test_bodies_that_are_no_request(server: Running, body: bytes, message: str) -> None:
    assert message in error_of(server.post(body), 400)["message"]


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "Hello"}, "messages", "valid array; given: Hello"),
    ({"messages": None}, "messages", "valid array"),
    ({"messages": [3]}, "messages[0]", "given: 3"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user' or 'assistant'"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]", "'text', 'image_url'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 4}]}]},
        "messages[0].content[0].text.text",
        "valid string",
    ),
    ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, "messages[0].cache", "messages[0].cache cannot be used"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "calls no tools"),
    ({"messages": [{"role": "system", "content": asking("x", "data:image/png;base64,AA")["content"]}]}, None, "role system"),
    ({"messages": [asking("x", "file:///etc/passwd")]}, "messages", "files of the server are not read"),
    ({"messages": [asking("x", "/etc/passwd")]}, "messages", "files of the server are not read"),
    ({"messages": [asking("x", "data:image/png;base64,!!!")]}, "messages", "not valid base64"),
    ({"messages": [asking("x", "data:text/html;base64,AAAA")]}, "messages", "not an image"),
    ({"messages": [asking("x", "data:image/png;base64,AAAA")]}, "messages", "image 1 is not an image in a known format"),
    ({"messages": [asking("x", *["data:,"] * 9)]}, "messages", "9 images were sent; expected at most 8"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer; given: 5"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 1e400}, None, ""),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "expected one of them"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": True}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": [1]}, "stop[0]", "valid string"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "expected token ids"),
    ({"logit_bias": {"99999": 1}}, None, "the model has"),
    ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object', 'json_schema'"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, None, "required"),
    ({"response_format": FORM | {"json_schema": {"schema": {"type": "x"}}}}, None, "json_schema cannot be used"),
    ({"response_format": FORM | {"json_schema": {"schema": {"x": "y" * 40_000}}}}, "response_format", "at most 32768"),
    ({"regex": "("}, None, "regex cannot be used"),
    ({"regex": "a", "choice": ["b"]}, None, "regex and choice were given"),
    ({"min_tokens": 9}, None, "min_new_tokens is 9"),
    ({"tools": [{"type": "function"}]}, "tools", "this server calls no tools"),
    ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
    ({"best_of": 3, "echo": True}, "best_of", "the fields best_of, echo cannot be used"),
]


@pytest.mark.parametrize(("change", "param", "message"), WRONG, ids=range(len(WRONG)))
def test_requests_that_cannot_be_answered(server: Running, change: dict[str, Any], param: str | None, message: str) -> None:
    """The parameter is named where one is at fault; a stream that cannot begin is refused likewise."""
    error = error_of(server.post(GOOD | change), 400)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert error_of(server.post({"stream": True, **GOOD, **change}), 400) == error


def test_fields_without_effect_are_taken(server: Running) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "tools": None,
        "modalities": ["text"],
    }
    echoed = {"role": "assistant", "content": "Hi", "boxes": [], "refusal": None, "annotations": [], "audio": None}
    assert server.post(GOOD | harmless | {"messages": [USER, echoed, USER | {"name": "me"}]}).status_code == 200


def test_characters_that_are_odd_but_text(server: Running) -> None:
    text = "a\0b \ufeff \u202e 🙂 \U0010ffff"
    assert server.post(GOOD | {"messages": [{"role": "user", "content": text}]}).status_code == 200


def test_other_errors_by_status(server: Running) -> None:
    assert error_of(server.post(GOOD | {"model": "gpt-9"}), 404)["code"] == "model_not_found"
    assert error_of(server.http.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    assert error_of(server.http.get("/v1/embeddings"), 404)["code"] == "not_found"
    assert error_of(server.http.get("/v1/chat/completions"), 405)["code"] == "not_found"
    assert error_of(server.post(json.dumps(GOOD).encode(), **{"Content-Type": "text/plain"}), 415)["code"] == "invalid_type"
    with pytest.raises(openai.NotFoundError, match="expected 'model'"), server.client() as client:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hello!"}])


def test_bodies_that_are_too_large_or_too_slow(server: Running) -> None:
    large = json.dumps(GOOD | {"user": "x" * 300_000}).encode()
    assert error_of(server.post(large), 413)["code"] == "request_too_large"
    assert error_of(server.post(iter([large[:150_000], large[150_000:]])), 413)["code"] == "request_too_large"
    small = json.dumps(GOOD).encode()
    assert server.post(iter([small[:5], small[5:]])).status_code == 200
    with server.connect() as connection:  # refused by its head alone
        connection.sendall(HEAD + b"Content-Length: 999999\r\n\r\n")
        assert b"413" in connection.recv(1000).splitlines()[0]
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        assert b"408" in connection.recv(1000).splitlines()[0]


def test_prompts_that_are_too_long(server: Running) -> None:
    for text, tokens in (("word " * 5_000, 3), ("Hello!", 12_000)):
        error = error_of(server.post(GOOD | {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}), 400)
        assert error["code"] == "context_length_exceeded"
    assert "12000" in error["message"]


def test_text_that_cannot_fit_is_not_even_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model) as server:
        monkeypatch.setattr(runtime.Processor, "prompt", None)
        error = error_of(server.post(GOOD | {"messages": [{"role": "user", "content": "x" * 800_000}]}), 400)
        assert error["code"] == "context_length_exceeded"


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsecond\n\n")
    keys = collect_keys(["first"], file, {"STATICVL_API_KEYS": "third, first,"})
    assert keys == ("first", "second", "third")
    with serving(far_model(tmp_path / "artifact"), keys=keys) as server:
        for key in keys:
            with server.client(key) as client:
                assert client.chat.completions.create(model="model", messages=[{"role": "user", "content": "x"}], max_tokens=2)
        for value in ("Bearer fourth", "Bearer", "Basic first", "first", "Bearer firs", "Bearer first1", "Bearer \xff"):
            headers = {"Authorization": value.encode("latin-1")}
            for path in ("/v1/models", "/v1/models/model", "/metrics"):
                assert error_of(server.http.get(path, headers=headers), 401)["code"] == "invalid_api_key"
            assert error_of(server.post(GOOD, **headers), 401)["type"] == "authentication_error"  # type: ignore[arg-type]
        assert error_of(server.http.get("/v1/models"), 401)
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/").status_code == 200
    KeyRing([]).check(None)


def test_wrong_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    cases = {
        ("--api-key-file", str(tmp_path / "empty")): "holds no key",
        ("--api-key", "a b"): "an API key has 3 characters",
        ("--max-body-mb", "0"): "--max-body-mb is 0; expected more than 0",
        ("--max-waiting", "-1"): "--max-waiting is -1; expected 0 or more",
        ("--host", "256.0.0.1"): "cannot listen at 256.0.0.1",
        ("--port", "0"): str(tmp_path / "none"),
    }
    for options, message in cases.items():
        assert main(["serve", str(tmp_path / "none"), *options]) == 1
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "staticvl.tools.serving.main")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "x"]) == 1
    assert "needs the package uvicorn; pip install 'staticvl[serve]'" in capsys.readouterr().err


def test_those_who_come_when_all_places_are_taken(tmp_path: Path) -> None:
    """Four in slots and two that wait; the seventh is told when to come again, and n counts as so many."""
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    with serving(model, max_waiting=2) as server:
        long = {"max_tokens": 3000, "ignore_eos": True}
        held = [server.begin(**long) for _ in range(6)]
        until(lambda: server.service.metrics.active == 6)
        response = server.post(GOOD)
        assert error_of(response, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        with pytest.raises(openai.RateLimitError):
            server.chat("Hello!")
        for connection in held[:3]:
            connection.close()
        until(lambda: server.service.metrics.active == 3)
        assert error_of(server.post(GOOD | {"n": 4}), 429)
        assert server.post(GOOD | {"n": 3}).status_code == 200
        for connection in held[3:]:
            connection.close()


def test_requests_that_take_too_long_end_with_what_they_have(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    slow_down(model)
    with serving(model, request_s=0.5) as server:
        got = server.post(GOOD | {"max_tokens": 10_000, "ignore_eos": True}).json()["choices"][0]
        assert (got["finish_reason"], got["finish_detail"]) == ("length", "deadline")
        body = GOOD | {"max_tokens": 10_000, "ignore_eos": True, "deadline_s": 0.001}
        assert server.post(body).json()["choices"][0]["finish_detail"] == "deadline"


def test_a_failing_device_is_an_error_without_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model) as server:
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.backend, "run", lambda *_: 1 / 0)
            error = error_of(server.post(GOOD), 500)
            assert error["code"] == "internal_error"
            assert "zero" not in error["message"]
            with pytest.raises(openai.APIError, match="failed inside the server"):
                server.chat("Hello!", stream=True)
        assert server.post(GOOD).status_code == 200


def test_a_connection_that_asks_nothing_is_dropped(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model, header_s=0.1) as server, server.connect() as silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b""


def test_the_head_of_a_second_request_has_to_end_too(tmp_path: Path) -> None:
    model = far_model(tmp_path / "artifact")
    with serving(model, header_s=0.1) as server, server.connect() as half, contextlib.suppress(ConnectionResetError):
        half.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        assert half.recv(4096).startswith(b"HTTP/1.1 200")
        half.sendall(b"GET /health HTTP/1.1\r\nHost: he")
        while part := half.recv(4096):  # the rest of the first answer, then the end
            assert b"HTTP/1.1" not in part


def test_no_path_is_redirected(tmp_path: Path) -> None:
    with serving(far_model(tmp_path / "artifact")) as server:
        for path in ("/health/", "/v1/models/", "/v1/chat/completions/"):
            assert server.http.get(path, follow_redirects=False).status_code == 404
