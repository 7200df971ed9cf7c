"""Images written as text: data: URLs and plain base64 to bytes."""

from __future__ import annotations

import binascii
import re
import urllib.parse

from ..shown import shown

KINDS = ("image/", "application/octet-stream", "")  # prefixes of the types that a data: URL may have


class ImageError(ValueError):
    """An image that cannot be used; the message says which one and why."""


def is_data_url(text: str) -> bool:
    """Whether a text is a data: URL; the case of the scheme does not matter."""
    return text[:5].lower() == "data:"


def data_url_name(url: str) -> str:
    """A data: URL without its image, for error messages."""
    return f"{shown(url.partition(',')[0])},..."


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data: URL of an image (RFC 2397), in base64 or percent-encoded.

    The type may be left out, or be application/octet-stream: the format is read from the bytes. Base64 may have line breaks and
    lack its padding, as in the URL standard. Raises ImageError for other types, and for more than `max_bytes`.
    """
    name = data_url_name(url)
    head, comma, body = url.partition(",")
    kind, *parameters = (part.strip().lower() for part in head[5:].split(";"))
    in_base64 = bool(parameters) and parameters[-1] == "base64"
    if not comma or not (kind.startswith("image/") or kind in KINDS):
        raise ImageError(f"{name} is not an image; expected data:image/...;base64,...")
    if not in_base64:
        data = urllib.parse.unquote_to_bytes(body) if len(body) <= 3 * max_bytes else None
        return _limited(data, name, max_bytes)
    if "%" in body:
        body = urllib.parse.unquote(body)
    return decode_base64(body, name, max_bytes)


def decode_base64(text: str, name: str, max_bytes: int) -> bytes:
    """The bytes of base64 with or without line breaks and padding; raises ImageError, whose message calls it `name`."""
    joined = re.sub(r"[ \t\r\n\f]", "", text)
    if len(joined) * 3 // 4 > max_bytes + 2:
        return _limited(None, name, max_bytes)
    try:
        data = binascii.a2b_base64(joined + "=" * (-len(joined) % 4), strict_mode=True)
    except ValueError as error:
        raise ImageError(f"{name} is not valid base64 ({shown(error)})") from None
    return _limited(data, name, max_bytes)


def _limited(data: bytes | None, name: str, max_bytes: int) -> bytes:
    if data is None or len(data) > max_bytes:
        raise ImageError(f"{name} holds more than the {max_bytes} bytes allowed")
    return data
