"""The page at /: one file, whose own script and style alone a browser may run."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from fastapi import Response

PAGE = Path(__file__).parent / "page.html"


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    """The file, and headers that allow nothing but what it holds: its script and style by their digests."""
    text = PAGE.read_text(encoding="utf-8")
    script, style = (_digests(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return text.encode(), headers


def _digests(text: str, tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)


def page_response() -> Response:
    content, headers = _page()
    return Response(content, media_type="text/html", headers=headers)
