"""Devices, and the backend that runs an artifact on one."""

from __future__ import annotations

from pathlib import Path

from ..artifact import ArtifactError, CacheSpec, Manifest
from ..opening import reading
from ..shown import quoted
from .base import Backend, Group

DEVICES = {"onnx": ("cpu",), "ascend": ("npu", "sim")}


def check_device(name: str, folder: Path, device: str) -> None:
    """Raises ArtifactError where graphs of the backend `name` never run on such a device."""
    if device.partition(":")[0] not in DEVICES.get(name, ()):
        usable, other = DEVICES[name], next((each for each, devices in DEVICES.items() if device in devices), None)
        remedy = f"use device {' or '.join(usable)}" + (f", or compile it with --backend {other}" if other else "")
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
    """The backend `name` for the graphs in `folder`, on `device`; raises ArtifactError when the two do not match.

    With a `manifest` (that of the rank's stage) the graphs share what can be shared; without one, while an artifact is being
    built, each stands alone. `group`: the other ranks, where graphs are those of one of several; `cache` is then this rank's.
    `verify`: check the prepacked weights of this machine, and pack them again where they are damaged.
    """
    check_device(name, folder, device)
    if name == "onnx":
        from .ort import open_ort

        with reading(folder, folder):
            return open_ort(folder, cache, threads=threads, manifest=manifest, group=group, verify=verify)
    from .ascend.backend import open_ascend

    assert manifest is not None, "the compiler opens Ascend backends itself"
    return open_ascend(folder, manifest, device, group)
