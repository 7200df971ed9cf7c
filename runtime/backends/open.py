"""Which backend runs an artifact on a device."""

from __future__ import annotations

from pathlib import Path

from ..artifact import ArtifactError, CacheSpec, Manifest
from ..opening import reading
from ..shown import quoted
from .base import Backend, Group

DEVICES = {"onnx": ("cpu",), "ascend": ("npu", "sim")}


def check_device(name: str, folder: Path, device: str) -> None:
    """Raises ArtifactError where graphs of kind `name` never run on such a device."""
    if device.partition(":")[0] not in DEVICES.get(name, ()):
        usable, wanted = DEVICES[name], next((kind for kind, devices in DEVICES.items() if device in devices), None)
        remedy = f"use device {' or '.join(usable)}" + (f", or compile it with --backend {wanted}" if wanted else "")
        raise ArtifactError(f"device {quoted(device)} cannot run {folder}, which was compiled for {name}; {remedy}")


def open_backend(
    name: str,
    folder: Path,
    cache: CacheSpec,
    *,
    device: str = "cpu",
    threads: int | None = None,
    manifest: Manifest | None = None,
    group: Group | None = None,
    verify: bool = False,
) -> Backend:
    """The backend for graphs of kind `name` in `folder`, on `device`; raises ArtifactError when the two do not match.

    With a `manifest` (that of the rank's stage) the graphs share what can be shared; without one, while an artifact is being
    built, each stands alone. `group`: the other ranks, where graphs are those of one of several; `cache` is then this rank's.
    `verify`: read what this machine has packed of the weights, and make it again where it is not what was written.
    """
    check_device(name, folder, device)
    if name == "onnx":
        from .ort import open_ort

        with reading(folder, folder):
            return open_ort(folder, cache, threads=threads, manifest=manifest, group=group, verify=verify)
    from .ascend.backend import open_ascend

    assert manifest is not None, "the compiler opens Ascend backends itself"
    return open_ascend(folder, manifest, device, group)
