"""A log in which an error takes at most one line, whatever a client sends and however it disconnects."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import Any

LOST_WRITES = "socket.send() raised exception."  # asyncio's, for each write to a connection that has just ended
MAX_FRAMES = 3
log = logging.getLogger(__name__)


def brief(error: BaseException) -> str:
    """An exception in one line: its type, its first line, and the innermost places that it came through."""
    text = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    places = ", ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {text}" + (f" ({places})" if places else "")


def log_in_one_line(loop: asyncio.AbstractEventLoop) -> None:
    """Make a loop, and asyncio's log, write one line in place of a traceback, or none where there is nothing to act on."""
    loop.set_exception_handler(_in_one_line)
    logging.getLogger("asyncio").addFilter(_worth_a_line)  # adding it again changes nothing


def _in_one_line(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    message = (str(context.get("message", "")).splitlines() or [""])[0]
    error = context.get("exception")
    log.warning("%s %s", message, brief(error) if error else "")


def _worth_a_line(record: logging.LogRecord) -> bool:
    return record.msg != LOST_WRITES
