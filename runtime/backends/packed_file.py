"""The file of prepacked weights that onnxruntime writes, laid out again so that everything in it is aligned.

Kernels fault on prepacked weights that are not aligned, and a session copies those that do not begin at a page; onnxruntime
aligns only tensors of a megabyte and more. It writes a tensor as it is, then the blobs that kernels have packed of it, with
their places in the tensor's entry: as for any external data, and

    prepacked_0: KERNEL+HASH|OFFSET;LENGTH;CHECKSUM     (|OFFSET;LENGTH;CHECKSUM and so on, where there are several)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

Entry = dict[str, str]  # the external data of one initializer

ALIGNMENT = 4096  # bytes, a page: blobs that begin elsewhere are copied into the heap of every session
PREPACKED = "prepacked"
_BLOCK = 1 << 22


def is_packed(entry: Mapping[str, str]) -> bool:
    return any(key.startswith(PREPACKED) for key in entry)


def lay_out(path: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Rewrite `path` with the data of `entries` alone, each part aligned; returns the entries for the new file.

    Raises OSError for entries of another form.
    """
    partial_file = path.with_name(path.name + ".partial")
    with path.open("rb") as source, partial_file.open("wb") as target:
        laid_out = {
            name: _moved_entry(entry, lambda offset, length: _copy(source, target, offset, length))
            for name, entry in entries.items()
        }
    partial_file.replace(path)
    return laid_out


def _moved_entry(entry: Entry, move: Callable[[int, int], int]) -> Entry:
    try:
        new_entry = {**entry, "offset": str(move(int(entry["offset"]), int(entry["length"])))}
        for key in (key for key in entry if key.startswith(PREPACKED)):
            kernel, *blobs = entry[key].split("|")
            parts = (blob.split(";") for blob in blobs)
            new_entry[key] = "|".join(
                [kernel, *(f"{move(int(offset), int(size))};{size};{check}" for offset, size, check in parts)]
            )
    except (KeyError, ValueError) as error:
        raise OSError(f"this release of onnxruntime describes packed weights in a form that is not known: {entry}") from error
    return new_entry


def _copy(source: BinaryIO, target: BinaryIO, offset: int, length: int) -> int:
    """Append bytes of `source` to `target`, aligned; the offset at which they begin."""
    begin = -(-target.tell() // ALIGNMENT) * ALIGNMENT
    target.seek(begin)
    source.seek(offset)
    while length and (block := source.read(min(length, _BLOCK))):
        target.write(block)
        length -= len(block)
    if length:
        raise OSError(f"{source.name} ends {length} bytes too early")
    return begin
