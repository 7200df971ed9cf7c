"""API keys: their sources, and the check of a request's key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ApiError


def collect_keys(options: Sequence[str], file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Keys of the command line, of a file (one a line; # begins a comment) and of STATICVL_API_KEYS (between commas).

    Raises ValueError for a file without a key, which would serve every client.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None else []
    of_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if file is not None and not of_file:
        raise ValueError(f"{file} holds no key; write one a line")
    of_environment = [key.strip() for key in environment.get("STATICVL_API_KEYS", "").split(",") if key.strip()]
    keys = (*options, *of_file, *of_environment)
    if invalid := [key for key in keys if not key.isascii() or not key.isprintable() or not key or " " in key]:
        raise ValueError(f"an API key has {len(invalid[0])} characters, not all of them visible ASCII; expected nothing else")
    return tuple(dict.fromkeys(keys))


class KeyRing:
    """The keys of a server. It compares digests, all of them each time, so that the time reveals nothing about any key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> None:
        """Raise ApiError, status 401, unless a header's value is "Bearer KEY" with one of the keys, or none is needed."""
        if not self._digests:
            return
        kind, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        if kind.lower() != "bearer" or not any(matches):
            message = "no valid API key was sent; expected the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
