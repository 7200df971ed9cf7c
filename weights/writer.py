"""Safetensors files written as a stream: the layout is known before the first tensor is read.

Data begins at a multiple of 64 bytes and so does every tensor, as far as sizes allow: the format forbids holes, so the tensors
whose sizes are multiples of 64 come first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.artifact import FileSpec, WeightSpec
from ..runtime.files import fsync_folder
from .tensors import StoredTensor, WeightsError

ALIGNMENT = 64
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8", "int8": "I8"}
_DTYPES = {name: getattr(torch, name) for name in _CODES}
_CHUNK = 1 << 18  # elements cast and written at once; they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One weight file before it is written: its path in the output folder, its header, and its tensors in file order."""

    file: str
    header: bytes
    tensors: dict[str, WeightSpec]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.tensors.values())


def lay_out(file: str, tensors: Mapping[str, StoredTensor]) -> WeightFile:
    """The layout of one file that holds `tensors`."""
    names = sorted(tensors, key=lambda name: -_alignment(tensors[name].nbytes))  # stable: otherwise the order of `tensors`
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        stored = tensors[name]
        entries[name] = {"dtype": _CODES[stored.dtype], "shape": stored.shape, "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    specs = {}
    at = len(header)
    for name in names:
        stored = tensors[name]
        specs[name] = WeightSpec(file=file, dtype=stored.dtype, shape=stored.shape, offset=at, nbytes=stored.nbytes)
        at += stored.nbytes
    return WeightFile(file, header, specs)


def write_weight_file(
    folder: Path, layout: WeightFile, read: Callable[[str], Tensor], progress: Callable[[int], object] | None = None
) -> FileSpec:
    """Write `folder`/`layout.file`; `read` gives each tensor, in file order. The file appears whole or not at all.

    Tensors may have any float dtype and are cast to the stored one. `progress` gets the number of bytes of each write.
    """
    path = folder / layout.file
    beside = path.with_name(path.name + ".partial")
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            for data in _contents(layout, read):
                file.write(data)
                digest.update(data)
                if progress:
                    progress(len(data))
                del data  # a view: it would keep this tensor in memory while the next one is read
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return FileSpec(nbytes=layout.nbytes, sha256=digest.hexdigest())


def _contents(layout: WeightFile, read: Callable[[str], Tensor]) -> Iterator[memoryview]:
    """The bytes of the file, piece by piece."""
    yield memoryview(layout.header)
    for name, spec in layout.tensors.items():
        yield from _pieces(read(name), spec)


def _pieces(tensor: Tensor, spec: WeightSpec) -> Iterator[memoryview]:
    """A tensor's bytes; each view is overwritten by the next."""
    assert tuple(tensor.shape) == spec.shape, (tensor.shape, spec)
    dtype = _DTYPES[spec.dtype]
    buffer = torch.empty(_CHUNK, dtype=dtype)
    for piece in tensor.reshape(-1).split(_CHUNK):
        cast = piece if piece.dtype == dtype else buffer[: len(piece)].copy_(piece)
        yield cast.view(torch.uint8).numpy().data


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch in this thread alone: streaming is bound by memory and disk, and waking a pool for each piece costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_space(folder: Path, needed: int) -> None:
    """Raise WeightsError unless `folder` has room for `needed` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(f"{folder} needs {needed} bytes, but only {free} are free; free some space or choose another disk")


def _alignment(nbytes: int) -> int:
    """The largest power of two, up to 64, that divides `nbytes`."""
    return min(ALIGNMENT, nbytes & -nbytes) if nbytes else ALIGNMENT
