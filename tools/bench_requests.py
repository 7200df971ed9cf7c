"""`staticvl bench --requests`: the latencies of requests from a file, which run as they arrive.

Each line of the file is a JSON object: `prompt`, and perhaps `images` (paths, beside the file, or URLs), `max_new_tokens` and
`time` of arrival in seconds. Times are milliseconds in the result unless a name says otherwise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from .. import runtime
from ..runtime.engine.request import Output, SamplingParams, Sequence
from ..runtime.processor.images import ImageSource
from ..runtime.processor.prompt import Prompt
from .machine import measurement


class RequestsError(ValueError):
    """A file of requests that cannot be replayed; the message names the line."""


class BenchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the file."""

    prompt: str
    images: tuple[str, ...] = ()
    max_new_tokens: int = 128
    time: float | None = None


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=args.json, highlight=False)
    requests = read_requests(args.requests)
    times = arrival_times(requests, args.rate, args.seed)
    model = runtime.load(
        args.artifact,
        device=args.device,
        threads=args.threads,
        prefill_budget=args.prefill_budget,
        reuse=not args.no_reuse,
        cache_gb=args.cache_gb,
        request_log=args.request_log,
    )
    replay = Replay(model, prepare_all(model, requests, args.requests.parent), times)
    result = {"artifact": args.artifact.name, **replay.run(), **measurement(args.threads)}
    if not args.json:
        console.print(table(result))
    print(json.dumps(result))
    return 0


def read_requests(path: Path) -> list[BenchRequest]:
    """The requests of a file, in its order; raises RequestsError."""
    decoder, requests = msgspec.json.Decoder(BenchRequest), []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            requests.append(decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise RequestsError(
                f"{path}, line {number}: {error}; expected a JSON object with prompt, and perhaps images, max_new_tokens, time"
            ) from None
    if not requests:
        raise RequestsError(f"{path} holds no request; expected a line for each")
    return requests


def arrival_times(requests: SequenceOf[BenchRequest], rate: float | None, seed: int) -> list[float]:
    """Seconds since the first arrival, in any order. With a rate, a Poisson process; raises RequestsError without either."""
    if rate is not None:
        if not rate > 0:
            raise RequestsError(f"--rate is {rate}; expected a number of requests a second above 0")
        return np.random.default_rng(seed).exponential(1 / rate, len(requests)).cumsum().tolist()
    times = [each.time for each in requests if each.time is not None]
    if len(times) < len(requests):
        raise RequestsError("not every request has a time; give --rate, the number of requests a second")
    return [each - min(times) for each in times]


def prepare_all(model: runtime.Model, requests: SequenceOf[BenchRequest], folder: Path) -> list[tuple[Prompt, SamplingParams]]:
    """All prompts and sampling parameters, prepared beforehand so that only the engine is measured."""
    ready = []
    for each in tqdm(requests, desc="preparing", disable=None):
        images: list[ImageSource] = [image if ":" in image else str(folder / image) for image in each.images]
        params = SamplingParams(max_new_tokens=each.max_new_tokens)
        ready.append((model.processor.prompt(each.prompt, images), params))
    return ready


@dataclass(slots=True)
class Replay:
    """A replay of requests at their times of arrival."""

    model: runtime.Model
    requests: list[tuple[Prompt, SamplingParams]]
    times: list[float]  # seconds from the start
    outputs: list[Output] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of one answer

    def run(self) -> dict[str, Any]:
        """The figures of all requests, which are answered as they arrive."""
        model, clock = self.model, self.model.engine.clock
        for graph in model.artifact.manifest.graphs:
            model.engine.backend.load(graph)
        order = sorted(range(len(self.times)), key=self.times.__getitem__)
        alive: dict[int, Sequence] = {}
        last: dict[int, float] = {}
        start, begun = clock(), 0
        with tqdm(total=len(order), desc="answering", disable=None) as bar:
            while begun < len(order) or alive:
                while begun < len(order) and start + self.times[order[begun]] <= clock():
                    sequence = model.new_sequence(*self.requests[order[begun]])
                    sequence.times.arrived = start + self.times[order[begun]]
                    alive[sequence.id] = sequence
                    model.start(sequence)
                    begun += 1
                if not alive:
                    time.sleep(max(0.0, start + self.times[order[begun]] - clock()))
                    continue
                for sequence in model.advance():
                    self._note(sequence, last, clock())
                    if sequence.finish_reason:
                        self.outputs.append(model.output(sequence))
                        model.end(alive.pop(sequence.id))
                        bar.update()
        return self.summary(clock() - start)

    def _note(self, sequence: Sequence, last: dict[int, float], now: float) -> None:
        if sequence.generated and not sequence.prefilling:
            if sequence.id in last:
                self.gaps.append(now - last[sequence.id])
            last[sequence.id] = now

    def summary(self, span: float) -> dict[str, Any]:
        timings = [out.timings for out in self.outputs]
        tokens = sum(len(out.token_ids) for out in self.outputs)
        return {
            "requests": len(self.outputs),
            "span_s": round(span, 3),
            "requests_per_s": round(len(self.outputs) / span, 3),
            "tokens_per_s": round(tokens / span, 1),
            "queue_ms": shares([each.queue_s for each in timings]),
            "ttft_ms": shares([each.first_token_s for each in timings]),
            # An answer of one token has no later token, so its time of one is 0.
            "tpot_ms": shares([out.timings.per_token_s for out in self.outputs if len(out.token_ids) > 1]),
            "between_tokens_ms": shares(self.gaps),
            **self.model.engine.metrics.summary(),
        }


def shares(seconds: SequenceOf[float]) -> dict[str, float]:
    """Percentiles of some times, in milliseconds: 50, 90, 99 and 100 %; then their mean and standard deviation."""
    values = np.array(seconds if len(seconds) else [0.0]) * 1e3
    result = {name: float(np.percentile(values, p)) for name, p in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))}
    return {
        name: round(value, 3) for name, value in (result | {"mean": float(values.mean()), "sd": float(values.std())}).items()
    }


def table(result: dict[str, Any]) -> Table:
    """The times as a table."""
    result_table = Table(
        title=f"{result['requests']} requests in {result['span_s']} s, {result['tokens_per_s']} tokens a second"
    )
    for column in ("milliseconds", "p50", "p90", "p99", "max", "mean", "sd"):
        result_table.add_column(column, justify="right")
    for name in ("queue_ms", "ttft_ms", "tpot_ms", "between_tokens_ms"):
        result_table.add_row(name.removesuffix("_ms"), *(f"{value:.1f}" for value in result[name].values()))
    return result_table
