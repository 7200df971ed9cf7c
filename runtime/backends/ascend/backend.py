"""Ascend: graphs that torchair compiled, on a card or on the simulator; the same engine, feeds and sampler as everywhere.

The backend holds one copy of the weights and of the cache for all buckets, as tensors on the device. What a step brings is
copied into tensors that stay where they are (addresses of a compiled graph never change), and the first output comes back as
float32: at once, or where the graph has candidates, when somebody asks for it. Weights are read once, when the first graph
that needs them is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ...artifact import ArtifactError, CacheSpec, FileSpec, GraphSpec, Manifest, Segment, Transfer, WeightSpec, rank_weights
from ...files import sha256_file
from ...locks import Hold, hold
from ...opening import reading
from ...sampling.candidates import candidates_of
from ...shown import quoted
from ..base import Group, Result, cache_name, check_group, checked, rows_to_copy, world_rank
from . import torchair_host
from .kernel import Kernel, ascend_info, check_ascend_info, load_kernel, load_program
from .readiness import card_index, missing
from .weights import map_weight, to_offsets, to_signed

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
# The other ranks, if any -> what has to hold while a kernel runs.
Context = Callable[[Group | None], contextlib.AbstractContextManager[None]]


def _nothing(_group: Group | None) -> contextlib.AbstractContextManager[None]:
    """A card's kernels find their group by themselves."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors live and what has to hold while a kernel runs."""

    name: str  # torch's
    context: Context = _nothing
    wide: bool = False  # compute in float32 whatever the graph says: tells mistakes from rounding


@dataclass(frozen=True, slots=True)
class _Bound:
    """Everything that one kernel takes, in order, for one slot; host arrays that are copied into it before a run."""

    tensors: list[Tensor]
    sources: list[tuple[Tensor, Tensor]]  # (what is refilled before each run, what the kernel reads)
    feed: Mapping[str, np.ndarray]
    arrays: dict[str, np.ndarray]  # the feed, and what other stages hand on
    before: list[Transfer]
    after: list[Transfer]
    cached: str | None  # the part of the cache that the first output is, if it is one
    returned: tuple[str, ...]  # outputs that are no cache

    def holds(self, feed: Mapping[str, np.ndarray]) -> bool:
        return self.feed is feed or all(self.arrays.get(name) is array for name, array in feed.items())


def _parts(graph: GraphSpec) -> tuple[list[Transfer], Segment, list[Transfer]]:
    """What a stage takes from others, its one segment, and what follows it; collectives are in the segment."""
    transfers = [step for step in graph.plan if isinstance(step, Transfer)]
    at, segment = next((i, step) for i, step in enumerate(graph.plan) if isinstance(step, Segment))
    return transfers[:at], segment, transfers[at:]


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
        group: Group | None = None,
    ) -> None:
        """`group`: the other ranks, where graphs are those of one of several; `cache` and `weights` are then this rank's.

        `files`: sizes and digests of the graph files. `keep`: see load_kernel.
        """
        import torch

        self.folder, self.specs, self.files, self.device, self.keep = folder, weights, files, device, keep
        self.group = group
        self.kept = Hold(None)  # of `keep`, while graphs are open
        self.dtype = torch.float32 if device.wide else getattr(torch, cache.dtype)
        self.caches = {
            name: torch.zeros(shape, dtype=torch.int8 if cache.dtype_of(name) == "int8" else self.dtype, device=device.name)
            for name, shape in cache.buffers().items()
        }
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self.bound: dict[tuple[str, int, int], _Bound] = {}

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self.kernels:
            return
        if self.keep and not self.kept.held:
            self.kept = hold(self.keep)
        path, spec = self.folder / graph.file, self.files[graph.file]
        with reading(path, self.folder):
            if graph.eager:
                self.kernels[graph.file] = load_program(path, spec, self.device.name, self.dtype, self.group)
            else:
                self.kernels[graph.file] = load_kernel(path, spec, self.keep)

    def unload(self, graph: GraphSpec) -> None:
        for key in [key for key in self.bound if key[0] == graph.file]:
            del self.bound[key]
        self.kernels.pop(graph.file, None)
        if not self.kernels:
            self.kept.close()

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        key = (graph.file, slot, image)
        bound = self.bound.get(key)
        if bound is None or not bound.holds(feed):
            bound = self.bound[key] = self._bind(graph, feed, slot, image)
        for step in bound.before:
            self._transfer(step, bound.arrays[step.name])
        for source, target in bound.sources:
            target.copy_(source)
        with self.device.context(self.group):
            output = self.kernels[graph.file](bound.tensors)
        if len(bound.returned) > 1:
            return _on_device(dict(zip(bound.returned, output, strict=True)))
        result = self._rows(bound.cached, slot, 1).float().cpu().numpy() if bound.cached else output.cpu().numpy()
        for step in bound.after:
            result = result if step.op == "send" else bound.arrays[step.name]
            self._transfer(step, result)
        return Result(result.__getitem__)

    def _transfer(self, step: Transfer, array: np.ndarray) -> None:
        """To or from another stage, through the host."""
        assert self.group is not None, "a stage runs in a group"
        (self.group.send if step.op == "send" else self.group.receive)(array, step.stage)

    def _bind(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int, image: int) -> _Bound:
        import torch

        self.load(graph)
        before, segment, after = _parts(graph)
        specs = {spec.name: spec for spec in (*graph.inputs, *(graph.buffers or ()), *graph.outputs)}
        received = [specs[step.name] for step in (*before, *after) if step.op == "receive"]
        arrays = {**feed, **{spec.name: np.zeros(spec.shape, spec.dtype) for spec in received}}
        inputs, sources = [], []
        for spec in map(specs.__getitem__, segment.inputs):
            if spec.name in self.caches:
                inputs.append(self._rows(spec.name, slot, spec.shape[0]))
            elif spec.name in arrays:
                source = torch.from_numpy(checked(graph, spec, arrays[spec.name]))
                inputs.append(source.to(self.device.name))  # on the CPU this is the array itself
                if inputs[-1] is not source:
                    sources.append((source, inputs[-1]))
            else:
                raise ValueError(f"{graph.name}: input {spec.name} was not fed; given: {', '.join(feed)}")
        # Outputs that belong into the cache and are no inputs: an image's keys.
        placed = [cache_name(name, image) for name in segment.outputs]
        inputs += [self._rows(name, slot, 1) for name in placed if name and name not in segment.inputs]
        constants = [self._constant(name, values) for name, values in graph.constants.items()]
        with reading(self.folder / graph.file, self.folder):
            weights = [self._weight(name) for name in graph.weights]
        tensors = [*weights, *constants, *inputs]
        returned = tuple(name for name, place in zip(segment.outputs, placed, strict=True) if place is None)
        return _Bound(tensors, sources, feed, arrays, before, after, placed[0], returned)

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            stem, _, part = name.rpartition(".")
            weight = self._stored(name)
            if part == "qweight":
                weight = to_signed(weight)
            elif part == "zeros":
                weight = to_offsets(weight, *(self._stored(f"{stem}.{each}") for each in ("qweight", "scales")))
            self.weights[name] = weight.to(self.device.name)
        return self.weights[name]

    def _stored(self, name: str) -> Tensor:
        return map_weight(self.folder, self.specs[name])

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


def _on_device(outputs: Mapping[str, Tensor]) -> Result:
    """The candidates come to the host, which waits for the device; the rows before them stay until they are asked for."""
    (_, first), *others = outputs.items()

    def fetch(rows: slice) -> np.ndarray:
        return first[rows].cpu().numpy()

    return Result(fetch, candidates_of({name: value.cpu().numpy() for name, value in others}), on_host=False)


def simulated(*, wide: bool = False) -> Device:
    """The simulator, in the graph's own types or in float32."""
    import functools

    from ..ge_simulator.simulator import Simulator

    host = torchair_host.load()
    return Device("cpu", lambda group: host.running_on(functools.partial(Simulator, wide=wide, group=group)), wide)


class RankedGroup(Group, Protocol):
    """A group whose members can also agree on another one: a card's own."""

    @property
    def store(self) -> Any:
        """A torch.distributed Store that all ranks share."""
        ...


def open_ascend(folder: Path, manifest: Manifest, device: str, group: Group | None = None) -> AscendBackend:
    """The backend of an Ascend artifact on "npu", "npu:1", "sim" or "sim:float32"; of one rank where there are several.

    A rank on "npu" takes the card of its LOCAL_RANK, as torchrun sets it, or of its rank, and joins the others over HCCL
    through the `store` of its group (RankedGroup); on "sim" it meets them through the group itself.
    Raises ArtifactError where something is missing, saying what, and where the graphs were compiled for something else or for
    another number of ranks.
    """
    assert manifest.ascend is not None, "a manifest of an Ascend artifact says what it was compiled for"
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ArtifactError("Ascend artifacts need torch; install it with: pip install 'staticvl[compile]'") from None
    check_group(str(folder), manifest.tp, group)
    simulating = device.startswith("sim")
    if simulating:
        where, soc = simulated(wide=_is_wide(device)), manifest.ascend.soc
    else:
        where, soc = _card(_ranks_card(device, group))
    check_ascend_info(folder, manifest, ascend_info(torchair_host.VERSION, soc))
    weights = rank_weights(manifest.weights, manifest.ranks, world_rank(group))
    _check_weights(folder, manifest, weights)
    if not simulating and group and group.size > 1:
        _join(cast(RankedGroup, group))
    keep = None if simulating else _keep(folder, soc, group)
    with reading(folder, folder):
        return AscendBackend(folder, manifest.cache, weights, manifest.files, where, keep, group)


def _is_wide(device: str) -> bool:
    """Whether the simulator is to compute in float32, whatever the graphs say: then what remains is no rounding."""
    if device not in ("sim", "sim:float32"):
        raise ArtifactError(
            f"device {quoted(device)} is unknown; expected sim, or sim:float32, which does not round to 16 bits"
        )
    return device == "sim:float32"


def _check_weights(folder: Path, manifest: Manifest, weights: Mapping[str, WeightSpec]) -> None:
    """Every weight file of the rank against its digest: a card reads them whole anyway, and nothing in a graph would tell."""
    for name in sorted({weight.file for weight in weights.values()}):
        log.info("checking %s", name)
        with reading(folder / name, folder):
            found = sha256_file(folder / name)
        if found != manifest.files[name].sha256:
            raise ArtifactError(
                f"{folder / name} is not the file that the manifest describes; compile or fetch the artifact again"
            )


def _ranks_card(device: str, group: Group | None) -> str:
    """The card of a rank, where none was named."""
    if group is None or group.stages * group.size == 1 or ":" in device:
        return device
    return f"{device}:{os.environ.get('LOCAL_RANK', world_rank(group))}"


def _join(group: RankedGroup) -> None:
    """Make the ranks' own group the default one of this process, over HCCL: graphs look for it when they are loaded."""
    import torch

    dist: Any = torch.distributed

    wanted = ("hccl", group.rank, group.size)
    if not dist.is_initialized():
        dist.init_process_group("hccl", store=dist.PrefixStore("hccl", group.store), rank=group.rank, world_size=group.size)
    elif (found := (dist.get_backend(), dist.get_rank(), dist.get_world_size())) != wanted:
        raise ArtifactError(
            "this process has a default process group already, over {} as rank {} of {}, but the graphs need one over {} as "
            "rank {} of {}; run them in a process of their own".format(*found, *wanted)
        )


def _card(device: str) -> tuple[Device, str]:
    """A card and the family of its chip."""
    try:
        import torch_npu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if "torch_npu" in str(error):
            raise ArtifactError(missing(device)) from error
        raise ArtifactError(
            f"torch_npu cannot be imported ({error}): CANN was not found; install the CANN toolkit and "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`"
        ) from error
    npu: Any = torch_npu.npu
    index, count = card_index(device), npu.device_count()
    if index >= count:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise ArtifactError(
            f"device {device} was asked for, but {count} Ascend cards are visible (ASCEND_RT_VISIBLE_DEVICES is {visible}); "
            "see `npu-smi info`"
        )
    npu.set_device(index)
    return Device(f"npu:{index}"), torchair_host.family(npu.get_device_name(index))


def _keep(folder: Path, soc: str, group: Group | None) -> Path:
    """Where the device's compiler keeps its results: beside the artifact, by chip, CANN version and rank, so that no two
    processes write one file; if that cannot be written, in a folder for this process."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    name = f"{soc}-{torch_npu.npu.utils.get_cann_version()}".replace(" ", "").replace("/", "-")
    if group:
        name += f"-rank-{world_rank(group)}-of-{group.stages * group.size}"
    path = folder / ".host" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="staticvl-"))
    return path
