"""Readers of traces: CSV and JSON lines, one request at a time, never the whole file in memory."""

from __future__ import annotations

import codecs
import csv
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from tqdm import tqdm

from ...runtime.shown import quoted, shown
from .columns import Request, find_columns, has_columns, read_row
from .json_entries import entries, holds_requests
from .reading import Reading
from .trace_error import TraceError
from .trace_files import MAX_DOCUMENT_BYTES, open_text

_BAR_FROM = 16 << 20  # bytes: less is read in a moment
_MAX_LINE_BYTES = 1 << 20
_MAX_FIELD_SETS = 1000
_MAX_CELL_LINES = 100  # of one quoted cell
_SEED = 20240


def read_trace(path: Path, reading: Reading | None = None) -> Iterator[Request]:
    """Every request of a file, with a progress bar for large ones; raises TraceError. Failed requests are left out.

    CSV, JSON lines, or one JSON document; each perhaps compressed by gzip. `reading`: options, and counts of what is left out.
    """
    if not path.is_file():
        raise TraceError(f"{shown(path)} is not a file; expected a trace of requests as CSV or JSON lines")
    reading, size, count = reading or Reading(), path.stat().st_size, 0
    with (
        open_text(path) as file,
        tqdm(total=size, desc="reading", unit="B", unit_scale=True, disable=None if size > _BAR_FROM else True) as bar,
    ):
        for request in _requests(file, path, reading, bar):
            if request is not None:
                count += 1
                yield request
    if not count:
        left_out = f" ({'; '.join(notes)})" if (notes := reading.notes()) else ""
        raise TraceError(f"{path} holds no request{left_out}; expected a line for each below the line of names")


def _requests(file: IO[bytes], path: Path, reading: Reading, bar: tqdm) -> Iterator[Request | None]:
    """Each request; None for one that is left out."""
    lines = _lines(file, path, bar, _MAX_LINE_BYTES)
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{path} is empty; expected a line for each request")
    while first[1].lstrip().startswith("#") and not has_columns(_split(first[1].lstrip("# ")), reading.columns):
        reading.preamble += 1
        if (first := next(lines, None)) is None:
            raise TraceError(f"{path} holds only comments; expected a line for each request")
    rows = _json_rows if first[1].lstrip()[:1] in ("{", "[") else _csv_rows
    return rows(path, (first[0], first[1].lstrip().lstrip("#")), lines, reading)


def _lines(file: IO[bytes], path: Path, bar: tqdm, most: int) -> Iterator[tuple[int, str]]:
    """(line number, text), blank lines left out."""
    number = 0
    while data := file.readline(most):
        number += 1
        bar.update(len(data))
        if number == 1 and data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
            most = MAX_DOCUMENT_BYTES  # a document may be one line
            data += b"" if data.endswith(b"\n") else file.readline(most)
        if len(data) >= most:
            raise TraceError(f"{path}, line {number}: the line has more than {most} bytes; expected one request")
        try:
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise TraceError(f"{path}, line {number}: the line is not UTF-8 text; expected CSV or JSON lines") from None
        if "\0" in text:
            raise TraceError(f"{path}, line {number}: the line holds a zero byte; expected CSV or JSON lines")
        if text.strip():
            yield number, text


# ---- CSV


def _csv_rows(
    path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], reading: Reading
) -> Iterator[Request | None]:
    if not has_columns(_split(first[1]), reading.columns):  # perhaps a line about the whole file, then the names
        second = next(lines, None)
        if second and has_columns(_split(second[1]), reading.columns):
            reading.preamble += 1
            first = second
    delimiter = _delimiter(first[1])
    names = _cells(first, delimiter, path, lines)
    columns = find_columns(names, f"{path}, line {first[0]}", reading.columns)
    # The same name twice: which one is meant cannot be known.
    if duplicates := sorted({name for name in columns.values() if names.count(name) > 1}):
        raise TraceError(f"{path}, line {first[0]}: the column {duplicates[0]} is there twice; rename one")

    def read(line: tuple[int, str]) -> Request:
        where, cells = f"{path}, line {line[0]}", _cells(line, delimiter, path, lines)
        if len(cells) != len(names):
            raise TraceError(
                f"{where}: the line has {len(cells)} columns, but the first has {len(names)}; correct or remove it"
            )
        return read_row(dict(zip(names, cells, strict=True)), columns, reading.times, where)

    for line in lines:
        yield reading.request(partial(read, line))


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _split(line: str) -> list[str]:
    """The cells of a line that may be no CSV."""
    return [cell.strip(' "\r\n') for cell in line.split(_delimiter(line))]


def _cells(line: tuple[int, str], delimiter: str, path: Path, lines: Iterator[tuple[int, str]]) -> list[str]:
    """The cells of a line, and of the lines after it where a quoted cell has line breaks."""
    text = line[1]
    for more in range(_MAX_CELL_LINES):
        try:
            return [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter, strict=True))]
        except csv.Error as error:
            following = next(lines, None) if "unexpected end of data" in str(error) and more < _MAX_CELL_LINES - 1 else None
            if following is None:
                raise TraceError(f"{path}, line {line[0]}: {error}; expected one request as CSV, all on one line") from None
            text += following[1]
    raise AssertionError  # the last turn returns or raises


# ---- JSON


def _json_rows(
    path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], reading: Reading
) -> Iterator[Request | None]:
    # Fields may be left out where they say nothing, so objects of one trace may differ in theirs.
    columns: dict[tuple[str, ...], dict[str, str]] = {}  # by names of fields

    def read(where: str, row: Any) -> Request:
        if not isinstance(row, dict):
            raise TraceError(f"{where}: an entry is {quoted(row)}; expected one JSON object a line, or lists of objects")
        names = tuple(row)
        if names not in columns:
            if len(columns) == _MAX_FIELD_SETS:
                raise TraceError(
                    f"{where}: lines have more than {_MAX_FIELD_SETS} different sets of fields; expected requests alone"
                )
            columns[names] = find_columns(names, where, reading.columns)
        return read_row(row, columns[names], reading.times, where)

    for where, value in _json_values(path, first, lines, reading):
        rows = entries(value, where, reading.columns)
        while (row := reading.attempt(partial(next, rows, None))) is not None:
            yield reading.request(partial(read, *row))


def _json_values(
    path: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]], reading: Reading
) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line, or of the one document that all lines are; a first object about the file is left out."""
    where = f"{path}, line {first[0]}"
    try:
        value = msgspec.json.decode(first[1])
    except (msgspec.MsgspecError, RecursionError) as error:
        yield str(path), _document(first[1], lines, f"{where}: {error}; expected one JSON object a line")
        return
    second = next(lines, None)
    if second and not holds_requests(value, reading.columns) and _line_holds_requests(second[1], reading):
        reading.preamble += 1
    else:
        yield where, value
    for line in itertools.chain([second] if second else [], lines):
        if (value := reading.attempt(partial(_decoded, path, line))) is not None:
            yield f"{path}, line {line[0]}", value


def _line_holds_requests(text: str, reading: Reading) -> bool:
    try:
        return holds_requests(msgspec.json.decode(text), reading.columns)
    except (msgspec.MsgspecError, RecursionError):
        return False


def _decoded(path: Path, line: tuple[int, str]) -> Any:
    try:
        return msgspec.json.decode(line[1])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise TraceError(f"{path}, line {line[0]}: {error}; expected one JSON object a line") from None


def _document(first: str, lines: Iterator[tuple[int, str]], message: str) -> Any:
    """The JSON value that starts with `first`; raises TraceError with `message` where there is none."""
    parts, size = [first], len(first)
    for _, text in lines:
        parts.append(text)
        size += len(text)
        if size > MAX_DOCUMENT_BYTES:
            raise TraceError(message)
    try:
        return msgspec.json.decode("".join(parts))
    except (msgspec.MsgspecError, RecursionError):
        raise TraceError(message) from None


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
