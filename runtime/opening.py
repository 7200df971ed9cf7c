"""Opening an artifact: what is checked before anything of it is used, and one sentence for whatever goes wrong with a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .artifact import Artifact, ArtifactError, open_artifact, read_manifest, verify
from .signature import check_signature

_SHOWN = 300  # characters of what a library said


class RunError(ArtifactError):
    """A run of a graph that failed; others may succeed."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What is checked besides manifest, sizes, and digests of graphs and tokenizer files.

    weights: their digests too, and those of what this machine packed of them. key: a file with the public key that the artifact
    must be signed for; a signature covers all files, so that all are checked then.
    """

    weights: bool = False
    key: Path | None = None

    @property
    def all_files(self) -> bool:
        return self.weights or self.key is not None


def open_checked(folder: Path, checks: Checks, rank: int | None = None) -> Artifact:
    """An artifact, checked and held; raises ArtifactError. `rank`: as of open_artifact."""
    if checks.key is not None:  # before a byte of another file is read
        check_signature(folder, read_manifest(folder), checks.key)
    opened = verify(folder, rank=rank) if checks.all_files else open_artifact(folder, rank)
    try:
        if checks.key is not None:  # the folder may have been replaced meanwhile
            check_signature(folder, opened.manifest, checks.key)
    except BaseException:
        opened.close()
        raise
    return opened


@contextlib.contextmanager
def reading(path: Path, folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of `path`, in the artifact `folder`: raises ArtifactError that names it."""
    try:
        yield
    except (ArtifactError, ImportError):
        raise
    except MemoryError as error:
        raise ArtifactError(
            f"{path} takes more memory than there is ({_short(error)}); free some, or compile for fewer slots and less context"
        ) from error
    except Exception as error:  # libraries raise what they like
        raise ArtifactError(f"{path} cannot be used ({_short(error)}); {remedy(folder)}") from error


def remedy(folder: Path) -> str:
    """What to do about a file that looks damaged."""
    return f"check the artifact with `staticvl verify {folder}`, then fetch or compile it again"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
