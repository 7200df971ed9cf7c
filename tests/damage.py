"""Ways in which a file of an artifact can be other than it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path, Path], None]  # the file, another one of the artifact


def rewritten(path: Path, data: bytes) -> None:
    """Another file at the same place: the artifact's files may be hard links to those of others."""
    path.unlink()
    path.write_bytes(data)


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    rewritten(path, bytes(data))


def cut(path: Path, _: Path) -> None:
    data = path.read_bytes()
    rewritten(path, data[: len(data) // 2])


def zero(path: Path, _: Path) -> None:
    rewritten(path, bytes(path.stat().st_size))


def swap(path: Path, other: Path) -> None:
    rewritten(path, other.read_bytes())


def missing(path: Path, _: Path) -> None:
    path.unlink()


def empty(path: Path, _: Path) -> None:
    rewritten(path, b"")


def fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def link_out(path: Path, _: Path) -> None:
    """The right bytes, elsewhere."""
    elsewhere = path.parent.parent.parent / f"{path.name}.elsewhere"
    shutil.copyfile(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


DAMAGES: tuple[Damage, ...] = (flip, cut, zero, swap, missing, empty, fifo, directory, link_out)


def linked_copy(artifact: Path, target: Path) -> Path:
    """A copy whose files are the same ones, so that it takes no time; its locks are its own."""
    return shutil.copytree(artifact, target, copy_function=os.link, ignore=shutil.ignore_patterns("*.lock"))
