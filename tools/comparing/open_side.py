"""Opens a folder as a side of a comparison."""

from __future__ import annotations

from pathlib import Path

from ...runtime.artifact import MANIFEST, Manifest, read_manifest
from ...runtime.backends.ascend.readiness import check_ready
from ...runtime.backends.open import check_device
from ...runtime.shown import shown
from ..ready import require
from .checkpoint import Checkpoint
from .hf_side import FAMILIES, open_hf_side
from .sides import Side, SideError
from .static_side import open_artifact_side, open_eager_side

BY = ("auto", "transformers", "eager")


def is_artifact(folder: Path) -> bool:
    """Whether a folder is an artifact; raises SideError for one that is neither an artifact nor a checkpoint."""
    if not folder.is_dir():
        raise SideError(f"{shown(folder)} is not a folder; expected a checkpoint or an artifact made by `staticvl compile`")
    if (folder / MANIFEST).is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    raise SideError(f"{folder} holds neither {MANIFEST} nor config.json; expected an artifact or a checkpoint")


def check_side(folder: Path, *, by: str = "auto", device: str = "auto") -> None:
    """Raises what `open_side` would raise for a missing device or package, before anything is opened."""
    if not is_artifact(folder):
        if by == "transformers":
            require("transformers")
        return
    backend = read_manifest(folder).backend
    if device != "auto":
        check_device(backend, folder, device)
    if backend == "ascend":
        check_ready("sim" if device == "auto" else device)


def open_side(
    folder: Path,
    *,
    by: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    vision_tower: Path | None = None,
    work: Path | None = None,
    like: Path | None = None,
) -> Side:
    """A side of a comparison. `by`: what runs a checkpoint. `like`: the other side, whose context the definitions must hold.

    Raises SideError, ArtifactError or ConfigError.
    """
    if is_artifact(folder):
        if by != "auto":
            raise SideError(f"{folder} is an artifact, which runs its own graphs; leave out the choice of {by} for it")
        return open_artifact_side(folder, device=device, threads=threads, name=str(folder))
    if device != "auto":
        raise SideError(f"{folder} is a checkpoint, which runs on the CPU; leave out --device for it")
    checkpoint = Checkpoint(folder, vision_tower=vision_tower, work=work)
    supported = checkpoint.config.family in FAMILIES and checkpoint.config.layout == "hf"
    supported &= checkpoint.packing is None  # transformers needs other packages for each form of quantised ones
    try:
        if by == "transformers" or (by == "auto" and supported and _has_transformers()):
            return open_hf_side(checkpoint, f"{folder} by transformers")
        context, images = _sizes(like)
        return open_eager_side(checkpoint, context=context, images=images, name=f"{folder} by its definitions")
    except BaseException:
        checkpoint.close()
        raise


def _has_transformers() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformers") is not None


def _sizes(like: Path | None) -> tuple[int | None, int | None]:
    """Context and images of the other side, where it is an artifact."""
    if like is None or not (like / MANIFEST).is_file():
        return None, None
    manifest: Manifest = read_manifest(like)
    return manifest.cache.context, manifest.cache.cross.images if manifest.cache.cross else None
