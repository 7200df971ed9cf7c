"""Digests of plain data, and whether a file still has its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.artifact import FileSpec
from ..runtime.files import sha256_file

HASH_ON_REUSE = 256 << 20  # of larger files only the size is checked; `staticvl verify` reads them


def digest(*parts: Any) -> str:
    """Digest of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=msgspec.to_builtins).encode()).hexdigest()


def intact(path: Path, spec: FileSpec) -> bool:
    """Whether a file is there as its entry says."""
    if not path.is_file() or path.stat().st_size != spec.nbytes:
        return False
    return spec.nbytes > HASH_ON_REUSE or sha256_file(path) == spec.sha256


def all_intact(out: Path, files: Mapping[str, FileSpec]) -> bool:
    """`files` by their paths within the folder `out`."""
    return all(intact(out / name, spec) for name, spec in files.items())
