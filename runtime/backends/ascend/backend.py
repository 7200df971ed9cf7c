"""Ascend: graphs that torchair compiled, on a card or on the simulator; the same engine, feeds and sampler as everywhere.

The backend holds one copy of the weights and of the cache for all buckets, as tensors on the device. The feed of a run is
copied into tensors with fixed addresses, which a compiled graph needs, and the first output comes back as
float32: at once, or where the graph has top-k candidates, when it is fetched. Weights are read once, when the first graph
that needs them is opened.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ...artifact import (
    IN_FLOAT32,
    ArtifactError,
    CacheSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    Segment,
    Transfer,
    WeightSpec,
    rank_weights,
)
from ...files import sha256_file
from ...locks import Hold, hold
from ...opening import reading
from ...sampling.candidates import candidates_of
from ...shown import quoted
from ..base import (
    Group,
    Result,
    cache_name,
    check_group,
    checked,
    copy_rows,
    copy_text_page,
    in_pages,
    world_rank,
)
from . import torchair_host
from .compile_cache import compile_cache_folder
from .kernel import Kernel, ascend_info, check_ascend_info, load_kernel, load_program
from .readiness import card_index, missing
from .weight_layout import NZ, WeightForm, artifact_forms_in_nz, in_layout, weight_layout
from .weights import map_weight, to_offsets, to_signed

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
# The group of ranks, if any -> a context in which a kernel runs.
Context = Callable[[Group | None], contextlib.AbstractContextManager[None]]


def _no_context(_group: Group | None) -> contextlib.AbstractContextManager[None]:
    """The context of a card, whose kernels find their group by themselves."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Device:
    """The place of tensors, and the context in which kernels run. `in_nz`: forms of weights that lie in FRACTAL_NZ."""

    name: str  # torch's
    context: Context = _no_context
    wide: bool = False  # compute in float32 whatever the graph says: tells mistakes from rounding
    in_nz: frozenset[WeightForm] = frozenset()

    def placed(self, weight: Tensor) -> Tensor:
        """A weight on the device, in its layout."""
        return in_layout(weight.to(self.name), self.in_nz)


@dataclass(frozen=True, slots=True)
class _BoundKernel:
    """The arguments of one kernel, in order, for one slot, and the host arrays that are copied into them before a run."""

    tensors: list[Tensor]
    sources: list[tuple[Tensor, Tensor]]  # (what is refilled before each run, what the kernel reads)
    feed: Mapping[str, np.ndarray]
    arrays: dict[str, np.ndarray]  # the feed, and what other stages send
    before: list[Transfer]
    after: list[Transfer]
    first_cache: str | None  # the cache buffer that the first output is written to, if any
    returned: tuple[str, ...]  # names of outputs that go into no cache

    def matches(self, feed: Mapping[str, np.ndarray]) -> bool:
        """Whether it was bound to the arrays of this feed."""
        return self.feed is feed or all(self.arrays.get(name) is array for name, array in feed.items())


def _split_plan(graph: GraphSpec) -> tuple[list[Transfer], Segment, list[Transfer]]:
    """A graph's transfers before its one segment, the segment, and the transfers after it. Collectives are in the segment."""
    transfers = [item for item in graph.plan if isinstance(item, Transfer)]
    index, segment = next((i, item) for i, item in enumerate(graph.plan) if isinstance(item, Segment))
    return transfers[:index], segment, transfers[index:]


class AscendBackend:
    """See backends.base.Backend."""

    def __init__(
        self,
        folder: Path,
        cache: CacheSpec,
        weights: Mapping[str, WeightSpec],
        files: Mapping[str, FileSpec],
        device: Device,
        compile_cache: Path | None = None,
        group: Group | None = None,
    ) -> None:
        """`group`: where the graphs are those of one rank of several; `cache` and `weights` are then this rank's.

        `files`: sizes and digests of the graph files. `compile_cache`: see load_kernel.
        """
        import torch

        self.folder, self.weight_specs, self.files, self.device = folder, weights, files, device
        self.cache = cache
        self.group = group
        self.compile_cache, self.compile_cache_hold = compile_cache, Hold(None)  # held while graphs are open
        self.dtype = torch.float32 if device.wide else getattr(torch, cache.dtype)
        self.caches = {
            name: torch.zeros(shape, dtype=torch.int8 if cache.dtype_of(name) == "int8" else self.dtype, device=device.name)
            for name, shape in cache.buffers().items()
        }
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.kernels: dict[str, Kernel] = {}
        self.bound: dict[tuple[str, int, int], _BoundKernel] = {}

    def load(self, graph: GraphSpec) -> None:
        if graph.file in self.kernels:
            return
        if self.compile_cache and not self.compile_cache_hold.held:
            self.compile_cache_hold = hold(self.compile_cache)
        path, spec = self.folder / graph.file, self.files[graph.file]
        with reading(path, self.folder):
            if graph.eager:
                self.kernels[graph.file] = load_program(path, spec, self.device.name, self.dtype, self.group)
            else:
                self.kernels[graph.file] = load_kernel(path, spec, self.compile_cache)

    def unload(self, graph: GraphSpec) -> None:
        for key in [key for key in self.bound if key[0] == graph.file]:
            del self.bound[key]
        self.kernels.pop(graph.file, None)
        if not self.kernels:
            self.compile_cache_hold.close()

    def run(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int = 0, image: int = 0) -> Result:
        key = (graph.file, slot, image)
        bound = self.bound.get(key)
        if bound is None or not bound.matches(feed):
            bound = self.bound[key] = self._bind(graph, feed, slot, image)
        for transfer in bound.before:
            self._transfer(transfer, bound.arrays[transfer.name])
        for source, target in bound.sources:
            target.copy_(source)
        with self.device.context(self.group):
            output = self.kernels[graph.file](bound.tensors)
        if len(bound.returned) > 1:
            return _on_device(dict(zip(bound.returned, output, strict=True)))
        result = self._rows(bound.first_cache, slot, 1).float().cpu().numpy() if bound.first_cache else output.cpu().numpy()
        for transfer in bound.after:
            result = result if transfer.op == "send" else bound.arrays[transfer.name]
            self._transfer(transfer, result)
        return Result(result.__getitem__)

    def _transfer(self, transfer: Transfer, array: np.ndarray) -> None:
        """Send an array to another stage, or receive it from there, through the host."""
        assert self.group is not None, "a stage runs in a group"
        (self.group.send if transfer.op == "send" else self.group.receive)(array, transfer.stage)

    def _bind(self, graph: GraphSpec, feed: Mapping[str, np.ndarray], slot: int, image: int) -> _BoundKernel:
        import torch

        self.load(graph)
        before, segment, after = _split_plan(graph)
        specs = {spec.name: spec for spec in (*graph.inputs, *(graph.buffers or ()), *graph.outputs)}
        received = [specs[transfer.name] for transfer in (*before, *after) if transfer.op == "receive"]
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
        # Outputs that go into the cache and are no inputs: an image's keys.
        cache_names = [cache_name(name, image) for name in segment.outputs]
        inputs += [self._rows(name, slot, 1) for name in cache_names if name and name not in segment.inputs]
        constants = [self._constant(name, values) for name, values in graph.constants.items()]
        with reading(self.folder / graph.file, self.folder):
            weights = [self._weight(name) for name in graph.weights]
        tensors = [*weights, *constants, *inputs]
        returned = tuple(name for name, cache in zip(segment.outputs, cache_names, strict=True) if cache is None)
        return _BoundKernel(tensors, sources, feed, arrays, before, after, cache_names[0], returned)

    def _weight(self, name: str) -> Tensor:
        if name not in self.weights:
            stem, _, part = name.removesuffix(IN_FLOAT32).rpartition(".")
            weight = self._stored(name.removesuffix(IN_FLOAT32))
            if name.endswith(IN_FLOAT32):
                weight = weight.float()
            elif part == "qweight":
                weight = to_signed(weight)
            elif part == "zeros":
                weight = to_offsets(weight, *(self._stored(f"{stem}.{each}") for each in ("qweight", "scales")))
            self.weights[name] = self.device.placed(weight)
        return self.weights[name]

    def _stored(self, name: str) -> Tensor:
        return map_weight(self.folder, self.weight_specs[name])

    def _constant(self, name: str, values: tuple[float, ...]) -> Tensor:
        """A constant as the same tensor in all kernels, since their addresses are fixed. One name has one value in all
        graphs."""
        import torch

        if name not in self.constants:
            self.constants[name] = torch.tensor(values, dtype=torch.float32, device=self.device.name)
        return self.constants[name]

    def _rows(self, name: str, slot: int, count: int) -> Tensor:
        """Of slots, or all pages."""
        return self.caches[name] if in_pages(self.cache, name) else self.caches[name][slot : slot + count]

    def read_cache(self, name: str, slots: int) -> np.ndarray:
        return self.caches[name][:slots].float().cpu().numpy().copy()

    def write_cache(self, name: str, value: np.ndarray) -> None:
        import torch

        self.caches[name][: len(value)].copy_(torch.from_numpy(value))

    def copy_slot(self, source: int, target: int, rows: int, images: int) -> None:
        copy_rows(self.caches, source, target, rows, images)

    def copy_page(self, source: int, target: int) -> None:
        copy_text_page(self.cache, self.caches, source, target)

    def give_back(self, slot: int, rows: int) -> None:
        """The cache is reserved as a whole."""

    def use_small_pages(self) -> None:
        """The cache is reserved as a whole."""


def _on_device(outputs: Mapping[str, Tensor]) -> Result:
    """A result whose candidates are copied to the host, which waits for the device; the first output stays until it is
    fetched."""
    (_, first), *others = outputs.items()

    def fetch(rows: slice) -> np.ndarray:
        return first[rows].cpu().numpy()

    return Result(fetch, candidates_of({name: value.cpu().numpy() for name, value in others}), on_host=False)


def simulated(*, wide: bool = False) -> Device:
    """The simulator as a device. `wide`: it computes in float32 in place of the graph's 16-bit floats."""
    import functools

    from ..ge_simulator.simulator import Simulator

    host = torchair_host.load()
    return Device("cpu", lambda group: host.running_on(functools.partial(Simulator, wide=wide, group=group)), wide)


def open_device(device: str) -> tuple[Device, str | None]:
    """A device by its name, and the family of a card's chip; None: the simulator. Raises ArtifactError where it is missing."""
    return (simulated(wide=_is_wide(device)), None) if device.startswith("sim") else _card(device)


class RankedGroup(Group, Protocol):
    """A group through whose store the ranks can also make a process group of cards."""

    @property
    def store(self) -> Any:
        """A torch.distributed Store that all ranks share."""
        ...


def open_ascend(folder: Path, manifest: Manifest, device: str, group: Group | None = None) -> AscendBackend:
    """The backend of an Ascend artifact on "npu", "npu:1", "sim" or "sim:float32". `group`: where it is one rank of several.

    A rank on "npu" takes the card of its LOCAL_RANK, as torchrun sets it, or of its rank, and joins the others over HCCL
    through the `store` of its group (RankedGroup); on "sim" its collectives are those of the group itself.
    On a card weights have the layout that weight_layout.VARIABLE names. Raises ArtifactError, which says what is missing, and
    where the graphs were compiled for another device or for another number of ranks.
    """
    assert manifest.ascend is not None, "a manifest of an Ascend artifact says what it was compiled for"
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ArtifactError("Ascend artifacts need torch; install it with: pip install 'staticvl[compile]'") from None
    check_group(str(folder), manifest.tp, group)
    simulating = device.startswith("sim")
    target, chip = open_device(device if simulating else _ranks_card(device, group))
    soc = chip or manifest.ascend.soc
    check_ascend_info(folder, manifest, ascend_info(torchair_host.VERSION, soc))
    weights = rank_weights(manifest.weights, manifest.ranks, world_rank(group))
    _check_weights(folder, manifest, weights)
    compile_cache = None
    if not simulating:
        if group and group.size > 1:
            _join(cast(RankedGroup, group))
        layout = weight_layout()
        compile_cache = compile_cache_folder(folder, soc, group, layout)
        if layout == NZ:
            target = replace(target, in_nz=artifact_forms_in_nz(folder, manifest))
    with reading(folder, folder):
        return AscendBackend(folder, manifest.cache, weights, manifest.files, target, compile_cache, group)


def _is_wide(device: str) -> bool:
    """Whether the simulator computes in float32, whatever the graphs say, so that differences are no rounding."""
    if device not in ("sim", "sim:float32"):
        raise ArtifactError(
            f"device {quoted(device)} is unknown; expected sim, or sim:float32, which does not round to 16 bits"
        )
    return device == "sim:float32"


def _check_weights(folder: Path, manifest: Manifest, weights: Mapping[str, WeightSpec]) -> None:
    """Raise ArtifactError for a weight file of the rank with another digest. A card reads them whole anyway."""
    for name in sorted({weight.file for weight in weights.values()}):
        log.info("checking %s", name)
        with reading(folder / name, folder):
            digest = sha256_file(folder / name)
        if digest != manifest.files[name].sha256:
            raise ArtifactError(
                f"{folder / name} is not the file that the manifest describes; compile or fetch the artifact again"
            )


def _ranks_card(device: str, group: Group | None) -> str:
    """The device of a rank: its own card, where none is named."""
    if group is None or group.stages * group.size == 1 or ":" in device:
        return device
    return f"{device}:{os.environ.get('LOCAL_RANK', world_rank(group))}"


def _join(group: RankedGroup) -> None:
    """Make a default process group of the ranks over HCCL, which graphs look for when they are loaded."""
    import torch

    dist: Any = torch.distributed

    required = ("hccl", group.rank, group.size)
    if not dist.is_initialized():
        dist.init_process_group("hccl", store=dist.PrefixStore("hccl", group.store), rank=group.rank, world_size=group.size)
    elif (present := (dist.get_backend(), dist.get_rank(), dist.get_world_size())) != required:
        raise ArtifactError(
            "this process has a default process group already, over {} as rank {} of {}, but the graphs need one over {} as "
            "rank {} of {}; run them in a process of their own".format(*present, *required)
        )


def _card(device: str) -> tuple[Device, str]:
    """A card and the family of its chip."""
    try:
        import torch_npu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if "torch_npu" in str(error):
            raise ArtifactError(missing(device)) from error
        raise ArtifactError(
            f"torch_npu cannot be imported ({error}): CANN is missing; install the CANN toolkit and "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`"
        ) from error
    npu: Any = torch_npu.npu
    index, count = card_index(device), npu.device_count()
    if index >= count:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "not set")
        raise ArtifactError(
            f"device is {device}, but {count} Ascend cards are visible (ASCEND_RT_VISIBLE_DEVICES is {visible}); "
            "see `npu-smi info`"
        )
    npu.set_device(index)
    return Device(f"npu:{index}"), torchair_host.family(npu.get_device_name(index))
