"""Two hours' worth of mixed traffic against `staticvl serve` on the embedded model, in minutes.

    python -m benchmarks.serve_soak [--requests 2400] [--clients 12] [--seed 0]

2400 requests are one every three seconds for two hours. Two thirds are honest questions about drawings, whole or streamed;
their answers must be those that the model gives alone. The other clients leave early, read slowly, send broken bodies or
hostile images. The server is killed after a third of the traffic and drained after another third, and restarted each time.
Checked are every status, every honest answer, that no slot and no request remains at the end of each life, and that memory
stays flat. Traffic goes to this machine only, and ends by itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options
from staticvl.tools.development.train_tiny import cases

EMBEDDED = Path(__file__).parent.parent / "tools" / "assets" / "tiny_llava15"
BUCKETS = Buckets(prefill=(16, 64), decode=(1, 2, 4), vision=(1, 2), context=512, slots=4)
TOKENS = 48
KINDS = {"whole": 36, "stream": 30, "leaves": 10, "leaves a stream": 8, "reads slowly": 3, "broken": 7, "hostile": 6}
BROKEN = (
    b"",
    b"{",
    b"\x00\xff\xfe",
    b"[]",
    b'{"model": "model"}',
    b'{"model": "model", "messages": ' + b"[" * 5000,
    b'"\\ud800"',
)
READY_S = 120


@dataclass(frozen=True)
class Question:
    text: str
    url: str
    answer: str


@dataclass
class Life:
    """One run of the server."""

    process: subprocess.Popen[str]
    port: int
    rss: list[tuple[int, float]] = field(default_factory=list)  # requests so far, MB


@dataclass
class Soak:
    questions: Sequence[Question]
    artifact: Path
    rng: random.Random
    life: Life
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    up: asyncio.Event = field(default_factory=asyncio.Event)


def start(artifact: Path) -> Life:
    options = ("--port", "0", "--model-name", "model", "--send-s", "5", "--max-waiting", "64", "--drain-s", "60")
    command = [sys.executable, "-m", "staticvl.tools.cli", "serve", str(artifact), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    return Life(process, int(process.stdout.readline().rsplit(":", 1)[1]))


async def call(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """HTTP 1.0: the answer ends with the connection."""
    reader, writer = await send(port, path, body)
    data = await reader.read()
    writer.close()
    head, _, rest = data.partition(b"\r\n\r\n")
    if not head:
        raise ConnectionResetError
    return int(head.split()[1]), rest


async def send(port: int, path: str, body: bytes | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    method = "GET" if body is None else "POST"
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body is not None else ""
    writer.write(f"{method} {path} HTTP/1.0\r\nHost: x\r\n{length}\r\n".encode() + (body or b""))
    await writer.drain()
    return reader, writer


def request_of(question: Question, **more: Any) -> bytes:
    parts = [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": question.url}}]
    body = {"model": "model", "messages": [{"role": "user", "content": parts}], "max_tokens": TOKENS, "temperature": 0}
    return json.dumps(body | more).encode()


def text_of(events: bytes) -> str:
    """The text of a complete stream."""
    lines = [line[6:] for line in events.splitlines() if line.startswith(b"data: ")]
    if not lines or lines[-1] != b"[DONE]":
        raise ConnectionResetError
    return "".join(choice["delta"].get("content", "") for line in lines[:-1] for choice in json.loads(line)["choices"])


def hostile(rng: random.Random, honest: str) -> str:
    data = bytearray(base64.b64decode(honest.partition(",")[2]))
    match rng.randrange(4):
        case 0:
            data = data[: rng.randrange(len(data) // 2)]
        case 1:
            data[16:24] = (60_000).to_bytes(4, "big") * 2
        case 2:
            data = bytearray(rng.randbytes(2000))
        case _:
            return rng.choice(("http://127.0.0.1:1/x.png", "http://[::1]/", "file:///etc/passwd", "http://2130706433/"))
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def one(soak: Soak, kind: str) -> None:
    """One client; raises OSError where the server is gone."""
    rng, port = soak.rng, soak.life.port
    question = rng.choice(soak.questions)
    path = "/v1/chat/completions"
    if kind in ("whole", "stream"):
        status, body = await call(port, path, request_of(question, stream=kind == "stream"))
        if status == 503 and b"unavailable" in body:
            raise ConnectionResetError
        text = (
            text_of(body) if kind == "stream" else json.loads(body)["choices"][0]["message"]["content"] if status == 200 else ""
        )
        if (status, text) != (200, question.answer):
            soak.faults.append(f"{kind}: status {status}, {text!r} instead of {question.answer!r}")
    elif kind in ("broken", "hostile"):
        question = Question(question.text, hostile(rng, question.url), "")
        status, body = await call(port, path, rng.choice(BROKEN) if kind == "broken" else request_of(question))
        if status == 503:
            raise ConnectionResetError
        if status != 400 or not json.loads(body)["error"]["message"]:
            soak.faults.append(f"{kind}: status {status}")
    else:
        options = {"stream": kind != "leaves", "max_tokens": 350, "ignore_eos": True}
        reader, writer = await send(port, path, request_of(question, **options))
        if kind == "reads slowly":
            for _ in range(20):
                await reader.read(256)
                await asyncio.sleep(0.05)
        elif kind == "leaves a stream":
            await reader.read(rng.randrange(1, 3000))
        else:
            await asyncio.sleep(rng.random() * 0.3)
        writer.transport.abort()


async def client(soak: Soak, work: list[str]) -> None:
    while work:
        kind = work.pop()
        while True:
            await soak.up.wait()
            life = soak.life
            try:
                await asyncio.wait_for(one(soak, kind), READY_S)
                break
            except (OSError, asyncio.IncompleteReadError):
                soak.counts["cut off"] += 1
                await asyncio.sleep(0.05)
                if soak.up.is_set() and soak.life is life and life.process.poll() is not None:
                    soak.faults.append(f"the server ended by itself with status {life.process.returncode}")
                    return
        soak.counts[kind] += 1
        count = sum(soak.counts[each] for each in KINDS)
        if count % 50 == 0:
            soak.life.rss.append((count, psutil.Process(soak.life.process.pid).memory_info().rss / 1e6))


async def check_idle(soak: Soak) -> None:
    """An idle server must hold no request and no slot."""
    idle = {"staticvl_requests_active": 0, "staticvl_sequences_running": 0, "staticvl_sequences_waiting": 0}
    figures: dict[str, float] = {}
    for _ in range(300):
        _, body = await call(soak.life.port, "/metrics")
        figures = {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", body.decode(), re.MULTILINE)}
        if all(figures[name] == value for name, value in idle.items()) and figures["staticvl_slots_free"] == BUCKETS.slots:
            return
        await asyncio.sleep(0.1)
    soak.faults.append(f"still held: { ({name: figures[name] for name in (*idle, 'staticvl_slots_free')}) }")


async def again(soak: Soak, way: signal.Signals) -> None:
    """Stop the server during traffic, and start it again."""
    soak.up.clear()
    soak.life.process.send_signal(way)
    status = await asyncio.to_thread(soak.life.process.wait, READY_S)
    if status != (0 if way == signal.SIGTERM else -way):
        soak.faults.append(f"after {way.name} the server ended with status {status}")
    soak.life = await asyncio.to_thread(start, soak.artifact)
    soak.up.set()


async def soaked(soak: Soak, requests: int, clients: int) -> list[Life]:
    lives = []
    for third, way in enumerate((signal.SIGKILL, signal.SIGTERM, None)):
        share = requests // 3
        work = soak.rng.choices(list(KINDS), list(KINDS.values()), k=share)
        soak.up.set()
        tasks = [asyncio.create_task(client(soak, work)) for _ in range(clients)]
        while len(work) > clients and not all(task.done() for task in tasks):
            await asyncio.sleep(0.02)
        lives.append(soak.life)
        if way is not None:
            await again(soak, way)
        await asyncio.gather(*tasks)
        await check_idle(soak)
        print(f"  {third + 1}/3: {dict(soak.counts)}, {len(soak.faults)} faults", flush=True)
    return lives


def growth(life: Life) -> float:
    """MB that memory grew by in the second half of a life."""
    half = life.rss[len(life.rss) // 2 :]
    return half[-1][1] - half[0][1] if len(half) > 1 else 0.0


def run(requests: int, clients: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="staticvl-soak-") as folder:
        artifact = Path(folder) / "artifact"
        build(Options(checkpoint=EMBEDDED, out=artifact, buckets=BUCKETS))
        soak = Soak(expected_answers(artifact), artifact, random.Random(seed), start(artifact))
        started = time.perf_counter()
        try:
            lives = asyncio.run(soaked(soak, requests, clients))
        finally:
            soak.life.process.kill()
            soak.life.process.wait()
        seconds = time.perf_counter() - started
    for fault in soak.faults[:20]:
        print(f"  fault: {fault}")
    return {
        "requests": sum(soak.counts[kind] for kind in KINDS),
        "seconds": round(seconds, 1),
        "kinds": dict(soak.counts),
        "faults": len(soak.faults),
        "rss_mb": [[round(life.rss[i][1]) for i in (0, len(life.rss) // 2, -1)] if life.rss else [] for life in lives],
        "growth_mb": [round(growth(life), 1) for life in lives],
    }


def expected_answers(artifact: Path) -> list[Question]:
    """Questions about drawings, and the model's answers without other traffic."""
    questions = []
    with runtime.load(artifact, reuse=False) as model:
        for case in [case for case in cases(12) if not case.turns and len(case.images) == 1]:
            file = io.BytesIO()
            case.images[0].save(file, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            answer = model.generate(case.question, list(case.images), max_new_tokens=TOKENS, temperature=0).text
            questions.append(Question(case.question, url, answer))
    return questions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--requests", type=int, default=2400, help="requests in all; default: 2400")
    parser.add_argument("--clients", type=int, default=12, help="clients at once; default: 12")
    parser.add_argument("--seed", type=int, default=0, help="seed of the traffic; default: 0")
    args = parser.parse_args(argv)
    report = run(args.requests, args.clients, args.seed)
    print(json.dumps(report))
    return int(report["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
