"""Opening an artifact with chosen checks; every error of one of its files becomes an ArtifactError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .artifact import Artifact, ArtifactError, open_artifact, read_manifest, verify
from .signature import check_signature

_SHOWN = 300  # characters of a library's message


class RunError(ArtifactError):
    """A run of a graph that failed; others may succeed."""


@dataclass(frozen=True, slots=True)
class Checks:
    """Checks besides those of manifest, sizes, and digests of graphs and tokenizer files.

    weights: digests of weights too, and of their packed copies on this machine. key: a file with the public key of the
    artifact's signature; a signature covers all files, so all are checked then.
    """

    weights: bool = False
    key: Path | None = None

    @property
    def all_files(self) -> bool:
        return self.weights or self.key is not None


def open_checked(folder: Path, checks: Checks, rank: int | None = None) -> Artifact:
    """Open an artifact with `checks`; raises ArtifactError. `rank` as in `open_artifact`."""
    if checks.key is not None:  # before a byte of another file is read
        check_signature(folder, read_manifest(folder), checks.key)
    artifact = verify(folder, rank=rank) if checks.all_files else open_artifact(folder, rank)
    try:
        if checks.key is not None:  # the folder may have been replaced meanwhile
            check_signature(folder, artifact.manifest, checks.key)
    except BaseException:
        artifact.close()
        raise
    return artifact


@contextlib.contextmanager
def reading(path: Path, folder: Path) -> Iterator[None]:
    """Turn any error of the block into an ArtifactError that names `path`, a file of the artifact `folder`."""
    try:
        yield
    except (ArtifactError, ImportError):
        raise
    except MemoryError as error:
        raise ArtifactError(
            f"{path} takes more memory than there is ({_short(error)}); free some, or compile for fewer slots and less context"
        ) from error
    except Exception as error:  # libraries raise exceptions of any type
        raise ArtifactError(f"{path} cannot be used ({_short(error)}); {remedy(folder)}") from error


def remedy(folder: Path) -> str:
    """The remedy for a file that looks damaged, as a part of a sentence."""
    return f"check the artifact with `staticvl verify {folder}`, then fetch or compile it again"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
