"""The artifact contract: what the compiler writes and the runtime reads. This file is its only description.

An artifact is a folder that can be moved or copied; every path in it is relative:

    manifest.json            everything below, as JSON, sealed by its own digest
    *.onnx, *.torchair       one graph per bucket; weights are referred to, never contained. Of a graph in steps (see below)
                             a folder with a file for each
    weights/*.safetensors    one copy of the weights, shared by every graph; of a model that is cut among ranks, those of rank R
                             lie in weights/rank-R/, in files of the same names with the same tensors at the same offsets
    tokenizer-*/             tokenizer files and the chat template, as the checkpoint gave them; definition.json, the sizes
                             of the model, which tools that check an artifact trace its definition from
    manifest.sig             where the artifact was signed: see signature.py

Files whose names begin with a dot are no part of it: what a build notes, locks, and what machines keep beside it (.host/).

Names of graph inputs and outputs (B rows, T tokens, S cache rows, H query heads, K kv heads, D head dim, C hidden size,
V vocabulary, P rows per tile):

    vision   pixels [tiles, size, size, 3] uint8                 -> image_rows [tiles, P, C]
    prefill  token_ids [1, T], row_index [1, T] (-1: embed the token id, else take that row of image_rows),
             image_rows [T, C], lengths [1] (tokens in the cache before this step), last_index [1],
             rope_cos, rope_sin [1, T, D], k_cache.N, v_cache.N [1, K, S, D]
                                                                 -> logits [1, V], the cache updated in place
    decode   token_ids [B, 1], lengths [B], rope_cos, rope_sin [B, 1, D], k_cache.N, v_cache.N [B, K, S, D]
                                                                 -> logits [B, V], the cache updated in place
    verify   (where an artifact has it) as decode, of one row and T tokens: token_ids [1, T], lengths [1],
             rope_cos, rope_sin [1, T, D], k_cache.N, v_cache.N [1, K, S, D]
                                                                 -> logits [T, V] behind each token, the cache updated in place

Text graphs may also put out what a token can nearly always be chosen from, N candidates: top_logits [R, N], the largest of
each of the R rows of logits, falling; top_ids [R, N]; and mass [R], the sum of exp((x - largest) * inverse_temperature) over
the row. They then take inverse_temperature [B]. The order of equals is up to the device, and so is which of those that equal
the smallest of the N are among them. Logits are the first output as ever, but need not be brought to the host.

Where queries are scaled by their position (Qwen's logn attention), text graphs also take query_scale [B, T, 1].

Where images enter by cross-attention (Llama-3.2-Vision; X keys per image, I images at most), prefill takes no
row_index and image_rows, and the cache has a second part that is never mixed with the first: cross_k.N.I, cross_v.N.I
[slots, K, X, D] for cross layer N and image I. A vision graph runs one image and its outputs are entries of that part:

    vision   pixels [tiles, size, size, 3] uint8, tile_count [1], aspect_id [1] -> cross_k.N, cross_v.N [1, K, X, D]

A text graph with `images` = n > 0 reads the first n images of its rows: cross_k.N.0 .. cross_k.N.n-1 [B, K, X, D] and the
same of cross_v, with cross_mask [B, T, n * tiles] (0 where a token sees a tile, else CROSS_HIDDEN) and cross_gate [B, T, 2]
(factors 0 or 1 of a cross layer's attention and MLP). A text graph with `images` = 0 has no cross layers at all.

A cache of text in 8 bits (CacheSpec.text_dtype) holds whole steps of scales, one for each channel of each kv head, which are
weights: text.layers.L.attn.k_scale and v_scale [K * D]. Keys are scaled as they lie there, behind the rotary embedding.
An ONNX graph whose chunk attends piece by piece also has outputs NAME@0, NAME@1 ... for an updated cache NAME: the same cache
behind each piece but the last. They are bound to the memory of NAME, as the input is.

Integers are int32. On Ascend the weights and the cache are float16 or bfloat16 (CacheSpec.dtype); inputs that a step brings
and outputs that are no cache are as above, so that the host does the same on both backends. Padding is on the right: a
prefill step writes T cache rows from `lengths` on, of which only the first last_index + 1 mean anything; the next step
overwrites the others and no real token attends to them.

A device without collectives runs a graph of one rank of several as steps: segments, each a file with named inputs and outputs,
and collectives between them. Their tensors are inputs and outputs of the graph, or buffers that live between segments. The
files are the same for all ranks; an ONNX segment names a weight file without its folder, and whoever opens the segment says
whose folder that is.

Of a pipeline each stage has a part of the layers, with graphs and a cache of its own (`Manifest.stages`); layers of caches are
counted from 0 in each. Its ranks are numbered one stage after another. Graphs of one name make one run together: steps
between stages hand on `next_hidden` [B, T, C], which is `hidden` to the next, and `next_features` [1, X, C] of images that
enter by cross-attention; the last stage gives `logits` back to the first.
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
from .manifest.cache import CacheSpec, CrossSpec
from .manifest.files import WEIGHTS, FileSpec, SourceFile, WeightSpec, rank_folder, rank_weights
from .manifest.graphs import (
    CANDIDATES,
    CROSS_HIDDEN,
    KINDS,
    Certificate,
    CertificateCase,
    Collective,
    GraphSpec,
    Kernels,
    Kind,
    Segment,
    Step,
    TensorSpec,
    Transfer,
    graph_name,
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
    "KINDS",
    "MANIFEST",
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
    "GraphSpec",
    "ImageProcessorConfig",
    "Kernels",
    "Kind",
    "Llama3Scaling",
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
    "graph_name",
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
    """An artifact folder whose manifest was read and found sound. For as long as it is held, a build that replaces the artifact
    leaves its files where they are."""

    folder: Path
    manifest: Manifest
    hold: Hold = field(default_factory=lambda: Hold(None), compare=False)

    def path(self, relative: str) -> Path:
        return self.folder / relative

    def close(self) -> None:
        """Hold the files no longer."""
        self.hold.close()


class _Version(msgspec.Struct):
    schema_version: int


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, sealed with their digest."""
    sealed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def _digest(manifest: Manifest) -> str:
    unsealed = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(unsealed, order="sorted")).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, encode_manifest(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; raises ArtifactError when it is missing, damaged, unsound or of another schema version."""
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
    """JSON leaves open which of two values of one key holds."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice in one object")


def open_artifact(folder: str | Path, rank: int | None = None) -> Artifact:
    """Read the manifest, check that every file is there with its size, and the digests of all but weights.

    Weights are checked by `verify`. `rank`, of all that the model is cut among: leave out the weights of others, which need not
    be on this machine. The files are held (see locks.py) until the result is closed or gone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{shown(folder)} is not a folder; expected an artifact made by `staticvl compile`")
    held = hold(folder)  # before the manifest is read, so that nothing it names goes away
    try:
        manifest = read_manifest(folder)
        for name, spec in manifest.files.items():
            if rank is None or not _belongs_to_another(name, manifest.ranks, rank):
                _check_size(folder, name, spec)
                if not name.startswith(f"{WEIGHTS}/"):
                    _check_digest(folder, name, spec)
    except BaseException:
        held.close()
        raise
    return Artifact(folder, manifest, held)


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
        found = sha256_file(folder / name, on_bytes)
    except OSError as error:
        raise ArtifactError(f"{folder / name} cannot be read ({error}); compile or fetch the artifact again") from error
    if found != spec.sha256:
        raise ArtifactError(f"{folder / name} does not match its sha256 in the manifest; compile or fetch the artifact again")


def verify(folder: str | Path, on_bytes: Callable[[int], object] | None = None, rank: int | None = None) -> Artifact:
    """Check the digest of every file; raises ArtifactError naming the first that differs. `rank`: as of open_artifact."""
    artifact = open_artifact(folder, rank)
    try:
        for name, spec in artifact.manifest.files.items():
            if rank is None or not _belongs_to_another(name, artifact.manifest.ranks, rank):
                _check_digest(artifact.folder, name, spec, on_bytes)
    except BaseException:
        artifact.close()
        raise
    return artifact
