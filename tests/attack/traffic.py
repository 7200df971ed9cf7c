"""Mixed honest traffic with and without attacks among it: how long honest requests take.

    python -m tests.attack.traffic [--minutes 1] [--rate 6] [--share 0.02] [--seed 0]

The same requests, whole and streamed, about the same images at the same times, four times in turn: without attacks, with, and
both again. Where attacks are, they replace a share of the requests; the same requests are left out of what is compared. The bar
is that the 99th percentile of honest requests with attacks is at most 1.5 times that without. An hour's worth of one request
every three seconds is 1200: `--minutes 3.4 --rate 6`. The last line is JSON. Exit status 1: above the bar, an honest answer
that is wrong, or an attack that ends in something not allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_soak import BUCKETS, EMBEDDED, Question, call, expected_answers, request_of, text_of
from staticvl.compiler.build import build
from staticvl.compiler.plan import Options

from . import fields, forms, images, urls, wire
from .case import Attempt, run_attempt
from .hosts import hosting
from .server import LIMITS, PATH, REFUSALS, Target, judged, serving

BAR = 1.5
PARTS = (False, True, False, True)  # whether attacks are among the requests
ALLOWED = {*REFUSALS, "answer", "HTTP 200", "HTTP 204", "closed"}
MORE_WAITING = (*LIMITS[:1], "64", *LIMITS[2:])
Maker = Callable[[random.Random], Attempt]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the schedule."""

    at_s: float
    question: Question
    stream: bool
    replaced: bool  # by an attack, in the parts that have some


@dataclass
class Part:
    """What one pass through the schedule came to."""

    attacked: bool
    seconds: list[float] = field(default_factory=list)  # of honest requests that are honest in every part
    faults: list[str] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)


def schedule(questions: Sequence[Question], count: int, rate: float, share: float, rng: random.Random) -> list[Arrival]:
    """Requests at random times, `rate` a second on average."""
    found, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(Arrival(now, rng.choice(questions), rng.random() < 0.5, rng.random() < share))
    return found


def makers(stack: ExitStack, target: Target) -> list[Maker]:
    """Attacks of each kind that goes over HTTP."""
    host = stack.enter_context(hosting())
    grounds: list[tuple[Any, Any, int]] = [
        (wire, wire.Ground(target, tuple(wire.menu())), len(wire.menu())),
        (fields, fields.Ground(target, tuple(fields.menu())), len(fields.menu())),
        (forms, forms.Ground(target, tuple(forms.menu()), beside=False), len(forms.menu())),
        (urls, urls.Ground(target, None, host, tuple(urls.menu(host.port))), len(urls.menu(host.port))),
    ]
    found: list[Maker] = [partial(_of_kind, module.KIND.make, ground, count) for module, ground, count in grounds]
    return [*found, partial(_image, target, images.samples())]


def _of_kind(make: Callable[..., Attempt], ground: Any, count: int, rng: random.Random) -> Attempt:
    return make(ground, rng, rng.randrange(count))


def _image(target: Target, samples: list[tuple[str, bytes]], rng: random.Random) -> Attempt:
    name, data = rng.choice(samples)
    change = rng.choice(list(images.CHANGES))
    url = "data:image/png;base64," + base64.b64encode(images.CHANGES[change](rng, data)).decode()
    body = json.dumps(urls.asking(url)).encode()
    return Attempt(f"{change} {name}", lambda: judged(*target.ask(body)))


async def honest(port: int, arrival: Arrival, part: Part) -> None:
    started = time.perf_counter()
    try:
        status, body = await call(port, PATH, request_of(arrival.question, stream=arrival.stream))
        said = (
            "" if status != 200 else text_of(body) if arrival.stream else json.loads(body)["choices"][0]["message"]["content"]
        )
    except OSError as error:
        status, said = 0, repr(error)
    if (status, said) != (200, arrival.question.answer):
        part.faults.append(f"status {status}, {said!r} instead of {arrival.question.answer!r}")
    if not arrival.replaced:
        part.seconds.append(time.perf_counter() - started)


async def attack(attempt: Attempt, part: Part, pool: ThreadPoolExecutor) -> None:
    ending, detail = await asyncio.get_running_loop().run_in_executor(pool, run_attempt, attempt)
    ending, _, more = ending.partition(": ")
    part.endings[ending] += 1
    if ending not in ALLOWED:
        part.faults.append(f"the attack {attempt.what} ends in: {ending} {more}{detail}"[:500])


async def replayed(target: Target, arrivals: list[Arrival], attempts: dict[int, Attempt], pool: ThreadPoolExecutor) -> Part:
    part, start = Part(bool(attempts)), time.perf_counter()
    tasks = []
    for place, arrival in enumerate(arrivals):
        await asyncio.sleep(max(0.0, start + arrival.at_s - time.perf_counter()))
        hostile = attempts.get(place)
        work = attack(hostile, part, pool) if hostile else honest(target.port, arrival, part)
        tasks.append(asyncio.create_task(work))
    await asyncio.gather(*tasks)
    return part


def run(minutes: float, rate: float, share: float, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="staticvl-traffic-") as name, ExitStack() as stack:
        folder, rng = Path(name), random.Random(seed)
        build(Options(checkpoint=EMBEDDED, out=folder / "onnx", buckets=BUCKETS))
        arrivals = schedule(expected_answers(folder / "onnx"), round(minutes * 60 * rate), rate, share, rng)
        target = stack.enter_context(serving(folder, "traffic", limits=MORE_WAITING))
        target.alone = False
        pool, kinds = stack.enter_context(ThreadPoolExecutor(32)), makers(stack, target)
        parts = []
        for attacked in PARTS:
            places = [i for i, each in enumerate(arrivals) if each.replaced and attacked]
            attempts = {place: rng.choice(kinds)(rng) for place in places}
            parts.append(asyncio.run(replayed(target, arrivals, attempts, pool)))
            print(f"  {_line(parts[-1])}", flush=True)
        left = target.trouble(thorough=True)
    for fault in [fault for part in parts for fault in part.faults][:20]:
        print(f"  fault: {fault}")
    return _report(parts, left)


def _line(part: Part) -> str:
    middle, high = np.percentile(part.seconds, (50, 99)) * 1000
    endings = ", ".join(f"{n} {name}" for name, n in part.endings.most_common())
    with_attacks = f"with {part.endings.total()} attacks ({endings})" if part.attacked else "without attacks"
    times = f"median {middle:.0f} ms, p99 {high:.0f} ms"
    return f"{len(part.seconds)} honest requests {with_attacks}: {times}, {len(part.faults)} faults"


def _report(parts: list[Part], left: str) -> dict[str, Any]:
    def p99(attacked: bool) -> float:
        return float(np.percentile([s for part in parts if part.attacked is attacked for s in part.seconds], 99))

    return {
        "honest": [len(part.seconds) for part in parts],
        "attacks": sum(part.endings.total() for part in parts),
        "p99_ms": [round(p99(attacked) * 1000, 1) for attacked in (False, True)],
        "ratio": round(p99(True) / p99(False), 3),
        "faults": sum(len(part.faults) for part in parts),
        "left": left,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=1, metavar="M", help="of each of the four parts; default: 1")
    parser.add_argument("--rate", type=float, default=6, metavar="R", help="requests a second; default: 6")
    parser.add_argument("--share", type=float, default=0.02, metavar="S", help="of requests that are attacks; default: 0.02")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    report = run(args.minutes, args.rate, args.share, args.seed)
    print(json.dumps(report))
    return int(report["ratio"] > BAR or report["faults"] > 0 or bool(report["left"]))


if __name__ == "__main__":
    sys.exit(main())
