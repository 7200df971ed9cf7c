"""Readers of traces: CSV and JSON lines, one request at a time, never the whole file in memory."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from tqdm import tqdm

from ...runtime.shown import quoted, shown
from .columns import Request, find_columns, read_row
from .time_units import TimeReader
from .trace_error import TraceError

_BAR_FROM = 16 << 20  # bytes: less is read in a moment
_MAX_LINE_BYTES = 1 << 20
_MAX_FIELD_SETS = 1000
_SEED = 20240


def read_trace(path: Path, times: TimeReader | None = None) -> Iterator[Request]:
    """Every request of a file, with a progress bar for large ones; raises TraceError. `times` reads the times."""
    if not path.is_file():
        raise TraceError(f"{shown(path)} is not a file; expected a trace of requests as CSV or JSON lines")
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None if size > _BAR_FROM else True) as bar,
    ):
        lines = _lines(file, path, bar)
        first = next(lines, None)
        if first is None:
            raise TraceError(f"{path} is empty; expected a line for each request")
        rows = _json_rows if first[1].lstrip().startswith("{") else _csv_rows
        count = 0
        for count, request in enumerate(rows(path, first, lines, times or TimeReader()), start=1):  # noqa: B007
            yield request
    if not count:
        raise TraceError(f"{path} holds no request; expected a line for each below the line of names")


def _lines(file: IO[bytes], path: Path, bar: tqdm) -> Iterator[tuple[int, str]]:
    """(line number, text), blank lines left out."""
    number = 0
    while data := file.readline(_MAX_LINE_BYTES):
        number += 1
        bar.update(len(data))
        if len(data) == _MAX_LINE_BYTES:
            raise TraceError(f"{path}, line {number}: the line has more than {_MAX_LINE_BYTES} bytes; expected one request")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise TraceError(f"{path}, line {number}: the line is not UTF-8 text; expected CSV or JSON lines") from None
        if "\0" in text:
            raise TraceError(f"{path}, line {number}: the line holds a zero byte; expected CSV or JSON lines")
        if text.strip():
            yield number, text


def _csv_rows(path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], times: TimeReader) -> Iterator[Request]:
    delimiter = max(",;\t", key=first[1].count)
    names = _cells(first, delimiter, path)
    columns = find_columns(names, f"{path}, line {first[0]}")
    # The same name twice: which one is meant cannot be known.
    if duplicates := sorted({name for name in columns.values() if names.count(name) > 1}):
        raise TraceError(f"{path}, line {first[0]}: the column {duplicates[0]} is there twice; rename one")
    for line in lines:
        where, cells = f"{path}, line {line[0]}", _cells(line, delimiter, path)
        if len(cells) != len(names):
            raise TraceError(
                f"{where}: the line has {len(cells)} columns, but the first has {len(names)}; correct or remove it"
            )
        yield read_row(dict(zip(names, cells, strict=True)), columns, times, where)


def _cells(line: tuple[int, str], delimiter: str, path: Path) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line[1]], delimiter=delimiter, strict=True))]
    except csv.Error as error:
        raise TraceError(f"{path}, line {line[0]}: {error}; expected one request as CSV, all on one line") from None


def _json_rows(path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], times: TimeReader) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(dict)

    def decode(line: tuple[int, str]) -> dict:
        try:
            return decoder.decode(line[1])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise TraceError(f"{path}, line {line[0]}: {error}; expected one JSON object a line") from None

    # Fields may be left out where they say nothing, so objects of one trace may differ in theirs.
    columns: dict[tuple[str, ...], dict[str, str]] = {}  # by names of fields
    for line in itertools.chain([first], lines):
        row, where = decode(line), f"{path}, line {line[0]}"
        names = tuple(row)
        if names not in columns:
            if len(columns) == _MAX_FIELD_SETS:
                raise TraceError(
                    f"{where}: lines have more than {_MAX_FIELD_SETS} different sets of fields; expected requests alone"
                )
            columns[names] = find_columns(names, where)
        yield read_row(row, columns[names], times, where)


# ---- a distribution instead of a trace


@dataclass(frozen=True, slots=True)
class Distribution:
    """A distribution: values, and the probability of each."""

    values: np.ndarray  # int64
    shares: np.ndarray  # float64, their sum is 1

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return rng.choice(self.values, size=count, p=self.shares).tolist()


def parse_distribution(text: str, option: str) -> Distribution:
    """ "100-500:3,1020:1": values from 100 to 500 alike, three times as often in all as 1020. Raises TraceError."""
    values: list[np.ndarray] = []
    shares: list[np.ndarray] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,7})(?:-(\d{1,7}))?(?::(\d+(?:\.\d+)?))?\s*", part)
        low, high, share = (int(match[1]), int(match[2] or match[1]), float(match[3] or 1)) if match else (1, 0, 0.0)
        if low > high or share <= 0:
            raise TraceError(f"{option} holds {quoted(part)}; expected N, N-M, N:SHARE or N-M:SHARE, e.g. 100-500:3,1020:1")
        values.append(np.arange(low, high + 1))
        shares.append(np.full(high - low + 1, share / (high - low + 1)))
    joined = np.concatenate(shares)
    return Distribution(np.concatenate(values), joined / joined.sum())


def random_requests(
    prompts: Distribution, generated: Distribution, images: Distribution | None, rate: float, count: int
) -> Iterator[Request]:
    """`count` requests, always the same ones, that arrive at random, `rate` a second (a Poisson process)."""
    rng = np.random.default_rng(_SEED)
    image_counts = images.draw(rng, count) if images else [0] * count
    gaps = rng.exponential(1 / rate, count).cumsum().tolist()
    for prompt, answer, seen, time in zip(
        prompts.draw(rng, count), generated.draw(rng, count), image_counts, gaps, strict=True
    ):
        if not prompt and not seen:
            raise TraceError("--prompts holds a prompt of 0 tokens without images; expected at least one token")
        yield Request(prompt=prompt, generated=answer, time=time, images=seen)
