"""The limit of JSON values in a body. Parsing keeps all other threads waiting, and a list of a million numbers is a small
file."""

from __future__ import annotations

from .errors import ApiError

SMALL = 1 << 16  # bytes of a body that is parsed in a few milliseconds whatever it holds
MAX_VALUES = 50_000
VALUES_PER_TOKEN = 4  # a text of the longest prompt may consist of quotation marks and commas


def check_values(body: bytes, context: int) -> None:
    """Raise ApiError for a body that may hold too many JSON values; marks inside of texts count as well.

    `context`: tokens of the longest prompt.
    """
    if len(body) <= SMALL:
        return
    limit = MAX_VALUES + VALUES_PER_TOKEN * context
    count = body.count(b'"') // 2 + body.count(b",") + body.count(b"[") + body.count(b"{")
    if count > limit:
        message = f"the body holds about {count} JSON values; expected at most {limit}, so send fewer"
        raise ApiError(400, message, code="request_too_large")
