"""A server process on loopback that is attacked, and what has to be as before once an attack is over."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .case import LONGEST_MESSAGE, REPO
from .lanes import Log
from .models import HONEST_TOKENS, IMAGE, QUESTION, compiled

READY_S = 120.0
SETTLE_S = 15.0  # within which all of a request must be gone once its client is
POOLED = 26  # threads that pools may still add: 16 that fetch, 1 that decodes, those of asyncio, one for a wait
LIMITS = ("--max-waiting", "16", "--fetch-s", "1", "--send-s", "3", "--max-body-mb", "4", "--max-image-pixels", "4000000")
URL = "data:image/png;base64," + base64.b64encode(IMAGE.read_bytes()).decode()
PATH = "/v1/chat/completions"
REFUSALS = tuple(f"HTTP {status}" for status in (400, 401, 403, 404, 405, 408, 411, 413, 414, 415, 422, 429, 431, 501, 505))
IDLE = {"staticvl_requests_active": 0, "staticvl_sequences_running": 0, "staticvl_sequences_waiting": 0}


def request(**changes: Any) -> dict[str, Any]:
    """An honest request, some of its fields changed."""
    content = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": URL}}]
    fields = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": HONEST_TOKENS,
        "temperature": 0,
    }
    return fields | changes


@dataclass
class Target:
    """A server, and how it was before it was attacked."""

    process: subprocess.Popen[bytes]
    port: int
    log: Log
    answer: str = ""
    fds: int = 0
    threads: int = 0
    processes: int = 0
    since: int = 0  # attacks since the last honest request
    alone: bool = True  # so that what an attack leaves can be seen; others ask at the same time where not

    def ask(self, body: bytes, limit_s: float = 30.0) -> tuple[int, bytes]:
        """Status and body of a completion; raises TimeoutError, OSError, http.client.HTTPException."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit_s)
        try:
            connection.request("POST", PATH, body, {"Content-Type": "application/json", "Connection": "close"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def honest(self) -> str:
        """The answer to the honest request."""
        status, body = self.ask(json.dumps(request()).encode())
        return json.loads(body)["choices"][0]["message"]["content"] if status == 200 else f"status {status}"

    def figures(self) -> dict[str, float]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", "/metrics", headers={"Connection": "close"})
            text = connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}

    def measure(self) -> None:
        """Take what there is now for what must be there after each attack."""
        self.answer = self.honest()
        self.ask(json.dumps(request(regex="(a|b){3}", max_tokens=3)).encode())  # forms may have a process of their own
        for _ in range(4):
            self.honest()
        time.sleep(0.2)
        process = psutil.Process(self.process.pid)
        self.fds, self.threads, self.processes = process.num_fds(), process.num_threads() + POOLED, len(process.children())

    def trouble(self, *, thorough: bool) -> str:
        """What an attack has left: empty, or the name of an ending that no kind allows, ": ", and more."""
        if self.process.poll() is not None:
            return f"the server ended: status {self.process.returncode}"
        left = _waited(self._left)
        if complaint := self.log.complaint():
            return f"traceback on stderr: {complaint}"
        if left:
            return left
        if thorough and (said := self.honest()) != self.answer:
            return f"an honest request is answered wrongly: {said!r} instead of {self.answer!r}"
        return ""

    def _left(self) -> str:
        figures, process = self.figures(), psutil.Process(self.process.pid)
        busy = {name: figures[name] for name, value in IDLE.items() if figures[name] != value}
        if busy or figures["staticvl_slots_free"] != figures["staticvl_slots"]:
            return f"leaves requests or slots: {busy}, {figures['staticvl_slots_free']:g} slots free"
        if (fds := process.num_fds()) > self.fds + 1:  # the connection that has just asked for figures
            return f"leaves file descriptors: {self.fds} -> {fds}"
        if (threads := process.num_threads()) > self.threads:
            return f"leaves threads: {threads}, expected at most {self.threads}"
        if (processes := len(process.children())) > self.processes:
            return f"leaves processes: {self.processes} -> {processes}"
        return ""


def _waited(left: Callable[[], str]) -> str:
    end = time.monotonic() + SETTLE_S
    while found := left():
        if time.monotonic() > end:
            return found
        time.sleep(0.05)
    return ""


@contextlib.contextmanager
def serving(folder: Path, name: str, *options: str, limits: Sequence[str] = LIMITS) -> Iterator[Target]:
    """A server of the tiny model; killed at the end."""
    log = Log(folder / f"{name}.log")
    command = [sys.executable, "-m", "tests.attack.serve", str(compiled(folder, "onnx")), "--port", "0", "--threads", "1"]
    command += ["--model-name", "model", *limits, *options]
    with log.path.open("ab") as stderr:
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=stderr)
    try:
        target = Target(process, _port(process), log)
        target.measure()
        yield target
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _port(process: subprocess.Popen[bytes]) -> int:
    """Where it listens, once it does so."""
    assert process.stdout
    line = process.stdout.readline().decode()
    port = int(line.rsplit(":", 1)[1])
    end = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            if b" 200 " in connection.recv(100):
                return port
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start: {line!r}")


EVERY = 10  # attacks between two honest requests


def checked(target: Target, run: Callable[[], str]) -> Callable[[], str]:
    """An attempt whose ending is that of `run`, unless it left something in the server."""

    def both() -> str:
        try:
            ending = run()
        except TimeoutError as error:
            ending = f"no answer in time: {error}"
        except (OSError, http.client.HTTPException) as error:
            ending = f"closed: {type(error).__name__} {error}"
        if not target.alone:
            return ending
        target.since += 1
        thorough = target.since % EVERY == 0 or ending.startswith(("HTTP 5", "no answer"))
        return target.trouble(thorough=thorough) or ending

    return both


def judged(status: int, body: bytes) -> str:
    """The ending of a completion: an answer, or a refusal in the API's form."""
    if status == 200:
        return _judged_answer(body)
    try:
        error = json.loads(body)["error"]
        sound = set(error) == {"message", "type", "param", "code"} and error["message"]
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        return f"HTTP {status} with a body of another form: {body[:300]!r}"
    long = len(error["message"]) > LONGEST_MESSAGE
    return (
        f"HTTP {status} with a message of more than {LONGEST_MESSAGE} characters: {body[:300]!r}" if long else f"HTTP {status}"
    )


def _judged_answer(body: bytes) -> str:
    try:
        if not body.startswith(b"data: "):
            return "answer" if json.loads(body)["choices"] else "HTTP 200 without an answer"
        events = [line[6:] for line in body.splitlines() if line.startswith(b"data: ")]
        failed = [event for event in events[:-1] if "error" in json.loads(event)]
        return "answer" if events[-1] == b"[DONE]" and not failed else f"a stream that fails: {events[-1][:300]!r}"
    except (ValueError, KeyError, TypeError) as error:
        return f"HTTP 200 without an answer: {error!r} in {body[:300]!r}"
