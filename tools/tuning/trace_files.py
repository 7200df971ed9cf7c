"""Files of traces as UTF-8 bytes: plain, compressed by gzip, or UTF-16 with a byte order mark."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .trace_error import TraceError

MAX_DOCUMENT_BYTES = 256 << 20
_GZIP = b"\x1f\x8b"


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; raises TraceError, also while it is read, where gzip's data is broken."""
    with path.open("rb") as plain:
        head = plain.read(2)
        plain.seek(0)
        if head == _GZIP:
            try:
                with gzip.open(plain) as file:
                    yield file  # pyright: ignore[reportReturnType]  # a GzipFile reads bytes
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise TraceError(f"{path} cannot be decompressed: {error}; expected a whole gzip file") from None
        elif head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield io.BytesIO(_utf16(plain, path))
        else:
            yield plain


def _utf16(file: IO[bytes], path: Path) -> bytes:
    data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise TraceError(f"{path} is UTF-16 text of more than {MAX_DOCUMENT_BYTES} bytes; store it as UTF-8")
    try:
        return data.decode("utf-16").encode()
    except UnicodeDecodeError:
        raise TraceError(f"{path} starts like UTF-16 text, and is none; expected UTF-8 text") from None
