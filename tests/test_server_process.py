"""The server as a process: signals, and ranks that are killed."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.runtime.artifact import open_artifact
from staticvl.tools.cli import main

from .conftest import EMBEDDED
from .damage import flip, linked_copy
from .servers import HEAD, TIMEOUT_S, asking, data_url, rest, send_request, until


@contextlib.contextmanager
def started(artifact: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`staticvl serve`, ready, and its port; killed at the end if it still runs."""
    command = [sys.executable, "-m", "staticvl.tools.cli", "serve", str(artifact), "--port", "0", "--threads", "1"]
    with subprocess.Popen(
        [*command, "--model-name", "model", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            until(lambda: answers_at(port))
            yield process, port
        finally:
            process.kill()


def get(port: int, path: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return rest(connection)


def answers_at(port: int) -> bool:
    try:
        return b"200 OK" in get(port, "/health")
    except OSError:
        return False


def test_a_signal_drains(embedded_artifact: Path) -> None:
    """A request that runs is finished, and all is well."""
    with started(embedded_artifact) as (process, port), socket.create_connection(("127.0.0.1", port)) as client:
        send_request(client, {"max_tokens": 400, "ignore_eos": True})
        until(lambda: b"requests_active 1.0" in get(port, "/metrics"))
        process.send_signal(signal.SIGTERM)
        client.settimeout(TIMEOUT_S)
        assert b'"completion_tokens":400' in rest(client)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err


def test_a_second_signal_ends_at_once(embedded_artifact: Path) -> None:
    with (
        started(embedded_artifact, "--drain-s", "600") as (process, port),
        socket.create_connection(("127.0.0.1", port)) as held,
    ):
        held.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        until(lambda: b"requests_active 1.0" in get(port, "/metrics"))
        process.send_signal(signal.SIGINT)
        until(lambda: b" 503 " in get(port, "/health"))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "ends at once" in err


def test_compiled_again_while_it_is_served(embedded_artifact: Path, tmp_path: Path) -> None:
    """Answers come from what was opened, graphs that nobody had used included, and /health and the log speak of the new one."""
    artifact = linked_copy(embedded_artifact, tmp_path / "a")
    fewer = Buckets(prefill=(16,), decode=(1,), vision=(1,), context=256, slots=1)
    request = {"max_tokens": 4, "ignore_eos": True, "messages": [asking("What is this?", data_url(Image.new("RGB", (40, 40))))]}
    with started(artifact) as (process, port):
        assert b'"artifact"' not in get(port, "/health")
        build(Options(checkpoint=EMBEDDED, out=artifact, buckets=fewer))
        for path in open_artifact(embedded_artifact).manifest.files:
            assert (artifact / path).exists()
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
            send_request(client, request)
            received = client.recv(1 << 16)
        assert b"200 OK" in received
        health = get(port, "/health")
        assert b'"ok"' in health
        assert b"a newer artifact lies in its folder; restart the server to serve it" in health
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.stderr
    assert main(["verify", str(artifact)]) == 0
    assert not set(open_artifact(embedded_artifact).manifest.files) & graphs_of(artifact)


def graphs_of(artifact: Path) -> set[str]:
    """Graphs that the manifest does not name."""
    return {path.name for path in artifact.glob("*.onnx")} - set(open_artifact(artifact).manifest.files)


def test_a_damaged_artifact_is_not_served(embedded_artifact: Path, tmp_path: Path) -> None:
    artifact = linked_copy(embedded_artifact, tmp_path / "a")
    weights = next((artifact / "weights").iterdir())
    flip(weights, weights)
    command = [sys.executable, "-m", "staticvl.tools.cli", "serve", str(artifact), "--port", "0", "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S * 2, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{weights} does not match its sha256 in the manifest; compile or fetch the artifact again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_killed_ends_all(two_ranks: Path, busy: bool) -> None:
    """While it answers, or while nobody asks: the server ends with an error that names it."""
    with started(two_ranks) as (process, port), socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as client:
        if busy:
            send_request(client, {"max_tokens": 480, "ignore_eos": True})
            until(lambda: b"sequences_running 1.0" in get(port, "/metrics"))
        [rank] = [child for child in psutil.Process(process.pid).children() if "staticvl" in " ".join(child.cmdline())]
        rank.kill()
        if busy:
            assert b" 503 " in client.recv(100)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "rank 1" in err
    assert "died: killed by SIGKILL" in err
