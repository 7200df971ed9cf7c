"""A log of requests: one JSON object a line, with the sizes and times of each, never a prompt or an answer.

A line is written at the end of the file by one system call, so that several processes may share a log. A last line without its
end was cut short by a crash; readers leave it out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..artifact import Record
from .request import Output


class RequestLogError(ValueError):
    """A log that cannot be read; the message names the line."""


class RequestRecord(Record, frozen=True, kw_only=True):
    """One finished request. Times are seconds, those of its course as in request.Timings."""

    time: float  # of its arrival, since 1970-01-01 UTC
    prompt_tokens: int  # of text; those of images are counted apart
    image_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) in pixels
    image_tokens: int = 0
    reused_tokens: int = 0  # positions of the prompt that a chat's slot already held
    generated: int
    finish_reason: str
    queue_s: float
    vision_s: float
    prefill_s: float
    first_token_s: float
    per_token_s: float
    total_s: float


def record_of(
    output: Output, arrived: float, image_sizes: tuple[tuple[int, int], ...] = (), reused_tokens: int = 0
) -> RequestRecord:
    """The record of an answer; `arrived` is in seconds since 1970-01-01 UTC."""
    timings = output.timings
    return RequestRecord(
        time=arrived,
        prompt_tokens=output.prompt_tokens - output.image_tokens,
        image_sizes=image_sizes,
        image_tokens=output.image_tokens,
        reused_tokens=reused_tokens,
        generated=len(output.token_ids),
        finish_reason=output.finish_reason,
        queue_s=timings.queue_s,
        vision_s=timings.vision_s,
        prefill_s=timings.prefill_s,
        first_token_s=timings.first_token_s,
        per_token_s=timings.per_token_s,
        total_s=timings.total_s,
    )


class RequestLog:
    """Appends records to a file; use it in a `with` block or close it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, record: RequestRecord) -> None:
        line = msgspec.json.encode(record) + b"\n"
        count = os.write(self._descriptor, line)
        if count != len(line):
            raise OSError(f"the request log took {count} of {len(line)} bytes of a line; free some space on its disk")

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_request_log(path: Path) -> Iterator[RequestRecord]:
    """The records of a log, one at a time; raises RequestLogError for a line that is not one."""
    decoder = msgspec.json.Decoder(RequestRecord)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise RequestLogError(f"{path}, line {number}: {error}; expected a record of a request log") from error
