"""Ascend: graphs that torchair compiled, on a card or on the simulator; the same engine, feeds and sampler as everywhere.

The backend holds one copy of the weights and of the cache for all buckets, as tensors on the device. What a step brings is
copied into tensors that stay where they are (addresses of a compiled graph never change), and the first output comes back as
float32. Weights are read once, when the first graph that needs them is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import ArtifactError, CacheSpec, FileSpec, GraphSpec, Manifest, WeightSpec
from ..ascend import torchair_host
from ..ascend.kernel import Kernel, ascend_facts, check_facts, load_kernel, load_program
from ..ascend.weights import map_weight, to_signed
from ..files import sha256_file
from .base import cache_name, checked, rows_to_copy

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
Context = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live and what has to hold while a kernel runs."""

    name: str  # torch's
    context: Context = contextlib.nullcontext
    wide: bool = False  # compute in float32 whatever the graph says: tells mistakes from rounding


@dataclass(frozen=True, slots=True)
class _Bound:
    """Everything that one kernel takes, in order, for one slot; host arrays that are copied into it before a run."""

    tensors: list[Tensor]
    sources: list[tuple[Tensor, Tensor]]  # (what the caller refills, what the kernel reads)
    feed: Mapping[str, np.ndarray]
    arrays: dict[str, np.ndarray]

    def holds(self, feed: Mapping[str, np.ndarray]) -> bool:
        return self.feed is feed or all(self.arrays.get(name) is array for name, array in feed.items())


class AscendBackend:
    """See backends.base.Backend."""

    def __init__(
        self,
        folder: Path,
        cache: CacheSpec,
        weights: Mapping[str, WeightSpec],
        files: Mapping[str, FileSpec],
        device: Device,
        keep: Path | None = None,
    ) -> None:
        """`files`: sizes and digests of the graph files. `keep`: see load_kernel."""
        import torch

        self.folder, self.specs, self.files, self.device, self.keep = folder, weights, files, device, keep
        self.dtype = torch.float32 if device.wide else getattr(torch, cache.dtype)
        self.caches = {
            name: torch.zeros(shape, dtype=self.dtype, device=device.name) for name, shape in cache.buffers().items()
        }
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self.bound: dict[tuple[str, int, int], _Bound] = {}

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self.kernels:
            return
        path, spec = self.folder / graph.file, self.files[graph.file]
        if graph.eager:
            self.kernels[graph.file] = load_program(path, spec, self.device.name, self.dtype)
        else:
            self.kernels[graph.file] = load_kernel(path, spec, self.keep)

    def unload(self, graph: GraphSpec) -> None:
        for key in [key for key in self.bound if key[0] == graph.file]:
            del self.bound[key]
        self.kernels.pop(graph.file, None)

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> np.ndarray:
        key = (graph.file, slot, image)
        bound = self.bound.get(key)
        if bound is None or not bound.holds(feed):
            bound = self.bound[key] = self._bind(graph, feed, slot, image)
        for source, target in bound.sources:
            target.copy_(source)
        with self.device.context():
            output = self.kernels[graph.file](bound.tensors)
        if name := cache_name(graph.outputs[0].name, image):
            return self._rows(name, slot, 1).float().cpu().numpy()
        return output.cpu().numpy()

    def _bind(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int, image: int) -> _Bound:
        import torch

        self.load(graph)
        inputs, sources = [], []
        for spec in graph.inputs:
            if spec.name in self.caches:
                inputs.append(self._rows(spec.name, slot, spec.shape[0]))
            elif spec.name in feed:
                source = torch.from_numpy(checked(graph, spec, feed[spec.name]))
                inputs.append(source.to(self.device.name))  # on the CPU this is the array itself
                if inputs[-1] is not source:
                    sources.append((source, inputs[-1]))
            else:
                raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        # Outputs that belong into the cache and are no inputs: a picture's keys.
        names = {spec.name for spec in graph.inputs}
        placed = [cache_name(spec.name, image) for spec in graph.outputs]
        inputs += [self._rows(name, slot, 1) for name in placed if name and name not in names]
        constants = [self._constant(name, values) for name, values in graph.constants.items()]
        tensors = [*map(self._weight, graph.weights), *constants, *inputs]
        return _Bound(tensors, sources, feed, dict(feed))

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            weight = map_weight(self.folder, self.specs[name])
            weight = to_signed(weight) if name.endswith(".qweight") else weight
            self.weights[name] = weight.to(self.device.name)
        return self.weights[name]

    def _constant(self, name: str, values: tuple[float, ...]) -> Tensor:
        """The same tensor at every call: a kernel takes its address for final. One name has one value in all graphs."""
        import torch

        if name not in self.constants:
            self.constants[name] = torch.tensor(values, dtype=torch.float32, device=self.device.name)
        return self.constants[name]

    def _rows(self, name: str, slot: int, count: int) -> Tensor:
        return self.caches[name][slot : slot + count]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.caches[name][:slots].float().cpu().numpy().copy()

    def write_cache(self, name: str, value: np.ndarray) -> None:
        import torch

        self.caches[name][: len(value)].copy_(torch.from_numpy(value))

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        for name, cache in self.caches.items():
            count = rows_to_copy(name, rows, images)
            cache[target, :, :count].copy_(cache[source, :, :count])


def simulated(*, wide: bool = False) -> Device:
    """The simulator, in the graph's own types or in float32."""
    import functools

    from ..ascend.simulator import Simulator

    host = torchair_host.load()
    return Device("cpu", lambda: host.running_on(functools.partial(Simulator, wide=wide)), wide)


def open_ascend(folder: Path, manifest: Manifest, device: str) -> AscendBackend:
    """The backend of an Ascend artifact on "npu", "npu:1" or "sim".

    Raises ArtifactError where something is missing, saying what, or where the graphs were compiled for something else.
    """
    assert manifest.ascend is not None, "a manifest of an Ascend artifact says what it was compiled for"
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ArtifactError("Ascend artifacts need torch; install it with: pip install 'staticvl[compile]'") from None
    if device == "sim":
        where, soc = simulated(), manifest.ascend.soc
    else:
        where, soc = _card(device)
    check_facts(folder, manifest, ascend_facts(torchair_host.VERSION, soc))
    _check_weights(folder, manifest)
    keep = None if device == "sim" else _keep(folder, soc)
    return AscendBackend(folder, manifest.cache, manifest.weights, manifest.files, where, keep)


def _check_weights(folder: Path, manifest: Manifest) -> None:
    """Every weight file against its digest: a card reads them whole anyway, and nothing in a graph would tell."""
    for name in sorted({weight.file for weight in manifest.weights.values()}):
        log.info("checking %s", name)
        if sha256_file(folder / name) != manifest.files[name].sha256:
            raise ArtifactError(
                f"{folder / name} is not the file that the manifest describes; compile or fetch the artifact again"
            )


def _card(device: str) -> tuple[Device, str]:
    """A card and the family of its chip."""
    try:
        import torch_npu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if "torch_npu" in str(error):
            raise ArtifactError(
                f"device {device} needs torch_npu, which is not installed: pip install torch_npu=={torchair_host.VERSION}"
            ) from error
        raise ArtifactError(
            f"torch_npu cannot be imported ({error}): CANN was not found; install the CANN toolkit and "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`"
        ) from error
    npu: Any = torch_npu.npu
    index, count = int(device.partition(":")[2] or 0), npu.device_count()
    if index >= count:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise ArtifactError(
            f"device {device} was asked for, but {count} Ascend cards are visible (ASCEND_RT_VISIBLE_DEVICES is {visible}); "
            "see `npu-smi info`"
        )
    npu.set_device(index)
    return Device(f"npu:{index}"), torchair_host.family(npu.get_device_name(index))


def _keep(folder: Path, soc: str) -> Path:
    """Where the device's compiler keeps its results: beside the artifact, by chip and CANN version; if that cannot be
    written, in a folder for this process."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    name = f"{soc}-{torch_npu.npu.utils.get_cann_version()}".replace(" ", "").replace("/", "-")
    path = folder / ".host" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="staticvl-"))
    return path
