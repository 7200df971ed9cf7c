"""Reading, writing and verifying artifacts: folders that the compiler writes and the runtime reads.

docs/artifact.md describes them; their records, in manifest/, are imported from here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .files import open_regular, read_regular, sha256_file, write_atomically
from .locks import Hold, hold
from .manifest.cache import PAGE_TOKENS, CacheSpec, CrossSpec
from .manifest.files import WEIGHTS, FileSpec, SourceFile, WeightSpec, rank_folder, rank_weights
from .manifest.graphs import (
    CANDIDATES,
    CROSS_HIDDEN,
    IN_FLOAT32,
    KINDS,
    Certificate,
    CertificateCase,
    Collective,
    GraphKey,
    GraphSpec,
    Kernels,
    Kind,
    LoweredCost,
    Segment,
    Step,
    TensorSpec,
    Transfer,
    is_cached,
)
from .manifest.manifest import SCHEMA_VERSION, AscendInfo, BuildInfo, CalibrationInfo, Manifest, StageSpec
from .manifest.model import (
    ImageProcessorConfig,
    Llama3Scaling,
    ModelInfo,
    RopeParameters,
    SamplingDefaults,
    TokenizerConfig,
)
from .manifest.record import Record
from .shown import shown
from .soundness import faults, leads_out

__all__ = [
    "CANDIDATES",
    "CROSS_HIDDEN",
    "DEFINITION",
    "IN_FLOAT32",
    "KINDS",
    "MANIFEST",
    "PAGE_TOKENS",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "WEIGHTS",
    "Artifact",
    "ArtifactError",
    "AscendInfo",
    "BuildInfo",
    "CacheSpec",
    "CalibrationInfo",
    "Certificate",
    "CertificateCase",
    "Collective",
    "CrossSpec",
    "FileSpec",
    "GraphKey",
    "GraphSpec",
    "ImageProcessorConfig",
    "Kernels",
    "Kind",
    "Llama3Scaling",
    "LoweredCost",
    "Manifest",
    "ModelInfo",
    "Record",
    "RopeParameters",
    "SamplingDefaults",
    "Segment",
    "SourceFile",
    "StageSpec",
    "Step",
    "TensorSpec",
    "TokenizerConfig",
    "Transfer",
    "WeightSpec",
    "encode_manifest",
    "is_cached",
    "open_artifact",
    "rank_folder",
    "rank_weights",
    "read_manifest",
    "verify",
    "write_manifest",
]

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
DEFINITION = "definition.json"
MOST_MANIFEST = 1 << 28  # bytes of manifest.json


class ArtifactError(ValueError):
    """An artifact that is missing, damaged, or not usable here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An open artifact: its folder and its checked manifest. A build that replaces it keeps its files until `close`."""

    folder: Path
    manifest: Manifest
    hold: Hold = field(default_factory=lambda: Hold(None), compare=False)

    def path(self, relative: str) -> Path:
        return self.folder / relative

    def close(self) -> None:
        """Release the files: builds may remove them from now on."""
        self.hold.close()


class _Version(msgspec.Struct):
    schema_version: int


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, sealed with the manifest's digest."""
    sealed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def _digest(manifest: Manifest) -> str:
    unsealed = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(unsealed, order="sorted")).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, encode_manifest(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json. Raises ArtifactError where it is missing, damaged, contradictory or of another schema version."""
    path = folder / MANIFEST
    if not path.exists():
        hint = "; it looks like a checkpoint: compile it first" if (folder / "config.json").is_file() else ""
        raise ArtifactError(f"{shown(folder)} holds no {MANIFEST}; expected a folder made by `staticvl compile`{hint}")
    try:
        data = read_regular(path, MOST_MANIFEST)
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {version}, this runtime reads version {SCHEMA_VERSION}; "
                "compile the checkpoint again with this release of staticvl"
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        json.loads(data, object_pairs_hook=_without_doubles)
    except ArtifactError:
        raise
    except (msgspec.MsgspecError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); compile the checkpoint again or fetch the artifact again") from error
    if manifest.digest != _digest(manifest):
        raise ArtifactError(
            f"{path} was changed after it was written (its digest differs); compile or fetch the artifact again"
        )
    if fault := next(faults(manifest), None):
        raise ArtifactError(f"{path} contradicts itself: {fault}; compile the checkpoint again or fetch the artifact again")
    return manifest


def _without_doubles(pairs: list[tuple[str, Any]]) -> None:
    """Raise ValueError for a key that an object has twice: JSON leaves open which of its values counts."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("an object has one key twice")


def open_artifact(folder: str | Path, rank: int | None = None) -> Artifact:
    """Open an artifact: read its manifest, check the size of every file, and the digests of all but weights.

    `verify` checks weights too. With a `rank`, counted over all ranks of the model, the weights of others are left out, which
    need not be on this machine. Builds keep the files (see locks.py) until the artifact is closed or collected. Raises
    ArtifactError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{shown(folder)} is not a folder; expected an artifact made by `staticvl compile`")
    files_hold = hold(folder)  # before the manifest is read, so that nothing it names goes away
    try:
        manifest = read_manifest(folder)
        for name, spec in manifest.files.items():
            if rank is None or not _belongs_to_another(name, manifest.ranks, rank):
                _check_size(folder, name, spec)
                if not name.startswith(f"{WEIGHTS}/"):
                    _check_digest(folder, name, spec)
    except BaseException:
        files_hold.close()
        raise
    return Artifact(folder, manifest, files_hold)


def _belongs_to_another(name: str, ranks: int, rank: int) -> bool:
    return name.startswith(f"{WEIGHTS}/rank-") and not name.startswith(f"{rank_folder(ranks, rank)}/")


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def _check_size(folder: Path, name: str, spec: FileSpec) -> None:
    path = folder / name
    if leads_out(name) or not _is_inside(path, folder):
        raise ArtifactError(
            f"{path} leads out of the artifact, or to itself; expected a file in it: copy the files themselves (cp -rL), or "
            "fetch it again"
        )
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; copy the whole artifact folder or compile again") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compile or fetch the artifact again") from error
    if size != spec.nbytes:
        raise ArtifactError(f"{path} has {size} bytes, expected {spec.nbytes}; compile or fetch the artifact again")


def _check_digest(folder: Path, name: str, spec: FileSpec, on_bytes: Callable[[int], object] | None = None) -> None:
    try:
        digest = sha256_file(folder / name, on_bytes)
    except OSError as error:
        raise ArtifactError(f"{folder / name} cannot be read ({error}); compile or fetch the artifact again") from error
    if digest != spec.sha256:
        raise ArtifactError(f"{folder / name} does not match its sha256 in the manifest; compile or fetch the artifact again")


def verify(folder: str | Path, on_bytes: Callable[[int], object] | None = None, rank: int | None = None) -> Artifact:
    """Open an artifact and check the digest of every file. Raises ArtifactError naming the first that differs.

    `on_bytes` gets the number of bytes of each read; `rank` as in `open_artifact`.
    """
    artifact = open_artifact(folder, rank)
    try:
        for name, spec in artifact.manifest.files.items():
            if rank is None or not _belongs_to_another(name, artifact.manifest.ranks, rank):
                _check_digest(artifact.folder, name, spec, on_bytes)
    except BaseException:
        artifact.close()
        raise
    return artifact
