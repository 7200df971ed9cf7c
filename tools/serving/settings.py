"""Settings of a server: limits and access."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and access. Times are seconds."""

    model_name: str
    keys: tuple[str, ...] = ()  # none: every client is served
    allow_private_urls: bool = False
    max_body_bytes: int = 32 * MIB
    max_images: int = 8  # of one request
    max_image_bytes: int = 16 * MIB  # of one image's file
    max_image_pixels: int = 40_000_000
    max_image_side: int = 10_000  # pixels; a padded square of this side is the largest that is made on the way
    max_image_ratio: int = 200  # of the longer side to the shorter
    max_chars_per_token: int = 64  # of text, per token of the context: more is refused before it is tokenised
    max_waiting: int = 64  # answers beside those that the slots hold
    request_s: float = 600  # from the first byte of a request to the last token
    body_s: float = 30  # until the body has arrived
    header_s: float = 30  # until a new connection has sent a request
    fetch_s: float = 20  # of one image at a URL
    stall_s: float = 60  # that the engine may need for one step before /health says so
    send_s: float = 60  # that a client may leave its answer unread
    drain_s: float = 30
    max_connections: int = 1000
