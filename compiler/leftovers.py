"""Files that builds leave in an artifact's folder, and their removal.

Files that the manifest does not name are removed as soon as it has replaced the old one. While processes hold the old artifact
(runtime/locks.py) they stay, until the first build or `staticvl verify` after the last of these processes has ended. A list
names the files to be removed later, so that `verify` never removes the finished parts of an interrupted build.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..runtime.artifact import KINDS, MANIFEST, SIGNATURE, WEIGHTS, Manifest, read_manifest
from ..runtime.files import read_regular, write_atomically
from ..runtime.locks import READERS, alone
from ..runtime.signature import is_stale
from .plan import EAGER_SUFFIX, SUFFIXES

JOURNAL = ".build.jsonl"
LOCK = ".build.lock"
WAITING = ".old-files.json"
HOST = ".host"  # files that machines keep beside an artifact
OWN = frozenset((MANIFEST, SIGNATURE, JOURNAL, LOCK, WAITING, READERS, WEIGHTS))
STEPS = re.compile(rf"({'|'.join(KINDS)})-.+(-[0-9a-f]{{12}}|\.twin\.partial)")  # folders of graphs in steps
_MOST = 1 << 28  # bytes of the list


def is_ours(path: Path) -> bool:
    """Whether a build made this file or folder, by its name."""
    if path.name in OWN:
        return True
    if path.is_dir():
        return path.name == HOST or path.name.startswith("tokenizer-") or STEPS.fullmatch(path.name) is not None
    return path.name.endswith((".partial", EAGER_SUFFIX, *SUFFIXES.values()))


def remove_unreferenced(out: Path, manifest: Manifest) -> int:
    """Remove files of earlier and interrupted builds that the manifest does not name; the number of files that stay in use."""
    (out / JOURNAL).unlink(missing_ok=True)
    if is_stale(out, manifest):
        (out / SIGNATURE).unlink(missing_ok=True)
    old = sorted(_unreferenced(out, manifest))
    return _remove(out, old)


def remove_waiting(out: Path) -> int:
    """Remove the files that wait, unless they are in use or a build runs; the number of files that stay in use.

    Raises OSError where the folder cannot be written.
    """
    if not (out / WAITING).exists():
        return 0
    with alone(out / LOCK) as free:
        return _remove(out, sorted(_waiting(out) & _unreferenced(out, read_manifest(out)))) if free else 0


def _remove(out: Path, names: list[str]) -> int:
    with alone(out / READERS) as free:
        if names and not free:
            write_atomically(out / WAITING, msgspec.json.encode(names))
            return len(names)
        for name in names:
            (out / name).unlink(missing_ok=True)
        (out / WAITING).unlink(missing_ok=True)
    _remove_empty(out)
    return 0


def _waiting(out: Path) -> set[str]:
    try:
        return set(msgspec.json.decode(read_regular(out / WAITING, _MOST), type=list[str]))
    except (msgspec.MsgspecError, OSError, RecursionError):
        return set()


def _unreferenced(out: Path, manifest: Manifest) -> set[str]:
    """Files of builds, by their paths within the folder."""
    suffixes = (*SUFFIXES.values(), EAGER_SUFFIX, ".partial")
    files = [path for suffix in suffixes for path in out.glob(f"*{suffix}")]
    files += [path for folder in _folders(out) for path in folder.rglob("*")]
    return {str(path.relative_to(out)) for path in files if not path.is_dir()} - set(manifest.files)


def _folders(out: Path) -> Iterator[Path]:
    yield from (path for path in out.iterdir() if path.is_dir() and path.name != HOST and is_ours(path))


def _remove_empty(out: Path) -> None:
    folders = [path for folder in _folders(out) for path in (folder, *folder.rglob("*")) if path.is_dir()]
    for path in sorted(folders, reverse=True):  # inner folders first
        with contextlib.suppress(OSError):  # not empty: in use
            path.rmdir()
