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

from .servers import HEAD, PATIENCE_S, rest, send_request, until


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
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return rest(connection)


def answers_at(port: int) -> bool:
    try:
        return b"200 OK" in get(port, "/health")
    except OSError:
        return False


def test_a_signal_drains(embedded_artifact: Path) -> None:
    """A request that runs is finished, and all is well."""
    with started(embedded_artifact) as (process, port), socket.create_connection(("127.0.0.1", port)) as asked:
        send_request(asked, {"max_tokens": 400, "ignore_eos": True})
        until(lambda: b"requests_active 1.0" in get(port, "/metrics"))
        process.send_signal(signal.SIGTERM)
        asked.settimeout(PATIENCE_S)
        assert b'"completion_tokens":400' in rest(asked)
        _, err = process.communicate(timeout=PATIENCE_S)
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
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "ends at once" in err


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True])
def test_a_rank_that_is_killed_ends_all(two_ranks: Path, busy: bool) -> None:
    """While it answers, or while nobody asks: the server ends with an error that names it."""
    with started(two_ranks) as (process, port), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as asked:
        if busy:
            send_request(asked, {"max_tokens": 480, "ignore_eos": True})
            until(lambda: b"sequences_running 1.0" in get(port, "/metrics"))
        [rank] = [child for child in psutil.Process(process.pid).children() if "staticvl" in " ".join(child.cmdline())]
        rank.kill()
        if busy:
            assert b" 503 " in asked.recv(100)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "rank 1" in err
    assert "died: killed by SIGKILL" in err
