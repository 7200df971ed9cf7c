"""From a checkpoint to the weight files of an artifact: streamed, resumable, every tensor accounted for.

Weights of a model that is cut among ranks lie in a folder of each rank, in files of the same names with the same tensors at
the same offsets, so that one graph can refer to any rank's:

    weights/PREFIX-00001.safetensors           the whole model
    weights/rank-0/PREFIX-00001.safetensors    rank 0 of several
"""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from ..model_defs.config import ModelConfig
from ..runtime.artifact import FileSpec, WeightSpec, rank_folder
from ..runtime.files import write_atomically
from .calibrated import Store
from .cut import Span, read_span
from .names.rule import Shape
from .packing.source import PackedSource
from .quantize import quantize
from .rules import Plan, Recipe, match, targets
from .shard import rank_span, rank_targets, shard_axis
from .source import Source
from .stored import FLOAT32, Floats, quant_of, stored_parts, stored_targets
from .tensors import SourceTensor, StoredTensor, WeightsError
from .writer import Shard, check_space, lay_out, one_thread, write_shard

_CHUNK = 1 << 18  # elements checked at once


@dataclass(frozen=True, slots=True)
class Converted:
    """Where every tensor lies, and size and digest of every file; file names are relative to the output folder."""

    weights: dict[str, WeightSpec]
    files: dict[str, FileSpec]


class _Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the journal: a file that was written whole. `header` tells another layout under the same name."""

    file: str
    header: str  # sha256
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How the weights of a model, or of one stage of a pipeline, are stored, and for which of its `tp` ranks.

    `quant`: "none" stores every tensor in floats; others store the decoder's linear layers in fewer bits (see quantize). Those
    that a PackedSource holds quantised keep their numbers; `quant` is then its packing's.
    `prefix` begins the names of files. It has to name source, config, quant, floats and tp: files of the same prefix that a
    broken-off run has finished are kept. `shard_bytes`: a file holds up to so many bytes of tensors; a larger tensor has a
    file to itself.
    """

    quant: str = "none"
    prefix: str
    floats: Floats = FLOAT32
    shard_bytes: int = 2 << 30
    tp: int = 1
    rank: int = 0

    def folder(self, config: ModelConfig) -> str:
        """Where the files of the rank lie, within the artifact."""
        stage = config.text.stage
        return rank_folder(self.tp * stage.count, self.tp * stage.index + self.rank)


def plan_shards(config: ModelConfig, conversion: Conversion) -> tuple[Shard, ...]:
    """The files that `convert` writes, known without any weights: PREFIX-00001.safetensors and so on.

    Raises WeightsError as `check_tp`.
    """
    shards: list[Shard] = []
    for tensors in _groups(config, conversion):
        shards.append(lay_out(f"{conversion.folder(config)}/{conversion.prefix}-{len(shards) + 1:05d}.safetensors", tensors))
    return tuple(shards)


def convert(
    source: Source,
    config: ModelConfig,
    out: Path,
    conversion: Conversion,
    *,
    calibrated: Store | None = None,
    progress: Callable[[int], object] | None = None,
) -> Converted:
    """Write what a rank holds of every parameter of `config` from `source` into `out`, one tensor in memory at a time.

    Of a pipeline, `config` is that of one stage, and the rank one of those that hold this stage.

    A journal beside the files, PREFIX.journal, tells which a broken-off run has finished; it stays until `forget_journal`.
    `progress` is called with the bytes of each step; they add up to the sizes of `plan_shards`. Layers that `calibrated` holds
    are taken from there.
    A tensor that is taken as it is is never whole in memory where it is cut; one that is made of others is made whole and then
    cut. Weights are cut before they are quantised.
    Raises WeightsError as `check_tp`, `match` and `Source.read` do, for values that are not finite, and for want of disk space.
    """
    shards = plan_shards(config, conversion)
    parts = _Parts(source, match(config, source.tensors), config, conversion, calibrated)
    folder = out / conversion.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partials(folder, conversion.prefix)
    journal = folder / f"{conversion.prefix}.journal"
    finished = _read_journal(out, journal, shards)
    check_space(out, sum(shard.nbytes for shard in shards if shard.file not in finished))
    for shard in shards:
        if shard.file in finished:
            if progress:
                progress(shard.nbytes)
            continue
        try:
            with one_thread():
                spec = write_shard(out, shard, parts.take, progress)
            finished[shard.file] = _Finished(shard.file, _digest(shard), spec.nbytes, spec.sha256)
            _write_journal(journal, finished)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WeightsError(
                f"the disk is full: {out / shard.file} could not be written ({shard.nbytes} bytes); free some space and "
                f"run the same command again, it keeps the {len(finished)} of {len(shards)} weight files that are finished"
            ) from error
        assert not parts.waiting, parts.waiting.keys()
    weights: dict[str, WeightSpec] = {}
    for shard in shards:
        assert not weights.keys() & shard.tensors.keys()
        weights |= shard.tensors
    assert weights.keys() == stored_targets(config, conversion.quant, conversion.floats, conversion.tp).keys()
    files = {shard.file: FileSpec(nbytes=shard.nbytes, sha256=finished[shard.file].sha256) for shard in shards}
    return Converted(weights, files)


def parameters(source: Source, config: ModelConfig) -> Callable[[str], Tensor]:
    """Gives each whole parameter of `config` once, in the checkpoint's dtype; raises WeightsError as `convert`."""
    return _Parts(source, match(config, source.tensors), config, Conversion(prefix="")).take


def forget_journal(out: Path, prefix: str, *, tp: int = 1, rank: int = 0) -> None:
    """Remove what only a resumed conversion needs."""
    folder = out / rank_folder(tp, rank)
    (folder / f"{prefix}.journal").unlink(missing_ok=True)
    _remove_partials(folder, prefix)


class _Parts:
    """Makes what one rank holds of each of our parameters once and hands out what is stored of it."""

    def __init__(
        self, source: Source, plan: Plan, config: ModelConfig, conversion: Conversion, calibrated: Store | None = None
    ) -> None:
        self.source, self.plan, self.conversion, self.calibrated = source, plan, conversion, calibrated
        self.owner = {
            part: name for name, shape in targets(config).items() for part in stored_parts(name, shape, conversion.quant)
        }
        self.spans = {name: _span(config, name, shape, conversion) for name, shape in targets(config).items()}
        self.shapes = rank_targets(config, conversion.tp)
        self.waiting: dict[str, Tensor] = {}  # parts of a tensor already read that come later in the file
        self.read: set[str] = set()

    def take(self, part: str) -> Tensor:
        if part not in self.waiting:
            self.waiting |= self._make(self.owner[part])
        return self.waiting.pop(part)

    def _make(self, name: str) -> dict[str, Tensor]:
        assert name not in self.read, name
        self.read.add(name)
        if self.calibrated and (stored := self.calibrated.parameter(name, self.conversion.rank)):
            for part, value in stored.items():
                self._check_range(part, value)
            return stored
        kind, stem = quant_of(name, self.conversion.quant), name.removesuffix(".weight")
        if kind != "none" and isinstance(self.source, PackedSource):
            parts = self._repacked(self.source, self.plan.recipes[name], self.spans[name], kind)
            return {f"{stem}.{part}": value for part, value in parts.items()}
        tensor = _filled(self._made(self.plan.recipes[name], self.spans[name]), self.shapes[name])
        if kind == "none":
            self._check_range(name, tensor)
            return {name: tensor}
        return {f"{stem}.{part}": value for part, value in quantize(kind, tensor).items()}

    def _made(self, recipe: Recipe, span: Span | None) -> Tensor:
        rule, pairs = recipe.rule, list(zip(recipe.tensors, recipe.rule.sources, strict=True))
        if rule.make is None and span is not None:
            ((tensor, ref),) = pairs
            start = ref.rows[0] if ref.rows else 0
            return read_span(lambda rows: self._read(tensor, (start + rows[0], start + rows[1])), rule.shape, span)
        sources = [self._read(tensor, ref.rows) for tensor, ref in pairs]
        whole = rule.make(sources) if rule.make else sources[0]
        del sources
        return span.of(whole) if span else whole

    def _repacked(self, source: PackedSource, recipe: Recipe, span: Span | None, kind: str) -> dict[str, Tensor]:
        """What is stored of a weight that the checkpoint holds quantised."""
        ((tensor, ref),) = zip(recipe.tensors, recipe.rule.sources, strict=True)
        assert recipe.rule.make is None, tensor.name
        return source.stored(tensor.name, kind, ref.rows, span)

    def _check_range(self, name: str, tensor: Tensor) -> None:
        """float16 ends at 65504; the others hold whatever a checkpoint can."""
        if self.conversion.floats.of(name, tuple(tensor.shape)) != "float16" or not tensor.is_floating_point():
            return
        largest = max(map(abs, _range(tensor)))
        if largest > torch.finfo(torch.float16).max:
            raise WeightsError(
                f"parameter {name} holds {largest:.3g}, more than float16 can store; compile with --dtype bfloat16"
            )

    def _read(self, tensor: SourceTensor, rows: tuple[int, int] | None) -> Tensor:
        read = self.source.read(tensor.name, rows)
        if not all(map(math.isfinite, _range(read))):
            raise WeightsError(f"{tensor.file}: tensor {tensor.name} holds values that are not finite; fetch the file again")
        return read


def _span(config: ModelConfig, name: str, shape: Shape, conversion: Conversion) -> Span | None:
    """What a rank holds of a parameter; None: all of it."""
    axis = shard_axis(config, name)
    if conversion.tp == 1 or axis is None:
        return None
    return Span(axis, *rank_span(config, name, shape, conversion.tp, conversion.rank))


def _filled(tensor: Tensor, shape: Shape) -> Tensor:
    """`tensor` with rows of zeros behind its own, up to `shape`."""
    missing = shape[0] - len(tensor)
    return torch.cat((tensor, tensor.new_zeros(missing, *shape[1:]))) if missing else tensor


def _range(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest value; nan where there is one."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    buffer = torch.empty(_CHUNK, dtype=torch.float32)
    ranges = [buffer[: len(piece)].copy_(piece).aminmax() for piece in tensor.flatten().split(_CHUNK)]
    return float(torch.stack([r.min for r in ranges]).min()), float(torch.stack([r.max for r in ranges]).max())


def _groups(config: ModelConfig, conversion: Conversion) -> Iterator[dict[str, StoredTensor]]:
    """Stored tensors of each file, in the order of `targets`; the parts of one parameter stay together."""
    group: dict[str, StoredTensor] = {}
    size = 0
    for name, shape in rank_targets(config, conversion.tp).items():
        parts = stored_parts(name, shape, conversion.quant, conversion.floats)
        nbytes = sum(part.nbytes for part in parts.values())
        if group and size + nbytes > conversion.shard_bytes:
            yield group
            group, size = {}, 0
        group |= parts
        size += nbytes
    yield group


def _digest(shard: Shard) -> str:
    return hashlib.sha256(shard.header).hexdigest()


def _read_journal(out: Path, path: Path, shards: tuple[Shard, ...]) -> dict[str, _Finished]:
    """The planned files that are there whole; a damaged line, another layout or another size means: not finished."""
    planned = {shard.file: shard for shard in shards}
    finished: dict[str, _Finished] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = msgspec.json.decode(line, type=_Finished)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        shard, file = planned.get(entry.file), out / entry.file
        if shard is None or entry.header != _digest(shard) or entry.nbytes != shard.nbytes:
            continue
        if file.is_file() and file.stat().st_size == shard.nbytes:
            finished[entry.file] = entry
    return finished


def _write_journal(path: Path, finished: dict[str, _Finished]) -> None:
    lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in finished.values())
    write_atomically(path, lines)


def _remove_partials(folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        if path.name.startswith(f"{prefix}-") and path.name.endswith(".partial"):
            path.unlink()
