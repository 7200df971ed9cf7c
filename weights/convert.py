"""From a checkpoint to the weight files of an artifact: streamed, resumable, every tensor accounted for.

Each rank of a sharded model has a folder of weight files. Their names and layouts are the same, so that one graph can refer to
any rank's:

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
from .ascend_contents import packed_features, padded_heads
from .ascend_forms import has_column_scales, packs_features
from .calibrated_layers import CalibratedLayers
from .head_padding import head_width
from .head_pieces import piece_of
from .merged_tensors import concatenated
from .merging import members_of
from .names.rule import Shape
from .packing.source import PackedSource
from .quantize import quantize, quantize_columns
from .shard import rank_span, rank_targets, shard_axis
from .shard_span import Span, read_span
from .source import Source
from .storage import FLOAT32, Floats, quant_of, stored_parts, stored_shapes, stored_targets
from .tensors import SourceTensor, StoredTensor, WeightsError
from .weight_map import Recipe, WeightMap, match, targets
from .writer import WeightFile, check_space, lay_out, one_thread, write_weight_file

_CHUNK = 1 << 18  # elements checked at once


@dataclass(frozen=True, slots=True)
class Converted:
    """The result: where every tensor lies, and size and digest of every file. File names are relative to the output folder."""

    weights: dict[str, WeightSpec]
    files: dict[str, FileSpec]


class _Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the journal: a file that was written whole. `header` identifies its layout."""

    file: str
    header: str  # sha256
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How the weights of a model, or of one stage of a pipeline, are stored, and for which of its `tp` ranks.

    `quant`: "none" stores every tensor in floats; others store the decoder's linear layers in fewer bits (see quantize). Those
    that a PackedSource holds quantised keep their numbers; `quant` is then its packing's.
    `ascend`: as artifacts for Ascend hold them: linear layers with the same input as one (merging.py), heads of a tower filled
    up (head_padding.py), a large lm_head in pieces (head_pieces.py), quantised layers in forms of their own (ascend_forms.py).
    `prefix` begins the names of files. It has to name source, config, quant, ascend, floats and tp: files of the same prefix
    that an interrupted run has finished are kept. `shard_bytes`: a file holds up to so many bytes of tensors; a larger tensor
    has a file to itself.
    """

    quant: str = "none"
    prefix: str
    ascend: bool = False
    floats: Floats = FLOAT32
    shard_bytes: int = 2 << 30
    tp: int = 1
    rank: int = 0

    def folder(self, config: ModelConfig) -> str:
        """Where the files of the rank lie, within the artifact."""
        stage = config.text.stage
        return rank_folder(self.tp * stage.count, self.tp * stage.index + self.rank)


def plan_weight_files(config: ModelConfig, conversion: Conversion) -> tuple[WeightFile, ...]:
    """The layouts of the files that `convert` writes: PREFIX-00001.safetensors and so on. They need no weights.

    Raises WeightsError as `check_tp`.
    """
    files: list[WeightFile] = []
    for tensors in _tensors_of_files(config, conversion):
        files.append(lay_out(f"{conversion.folder(config)}/{conversion.prefix}-{len(files) + 1:05d}.safetensors", tensors))
    return tuple(files)


def convert(
    source: Source,
    config: ModelConfig,
    out: Path,
    conversion: Conversion,
    *,
    calibrated: CalibratedLayers | None = None,
    progress: Callable[[int], object] | None = None,
) -> Converted:
    """Write what a rank holds of every parameter of `config` from `source` into `out`, one tensor in memory at a time; beside
    it, of merged layers, the merged tensor.

    Of a pipeline, `config` is that of one stage, and the rank one of those that hold this stage.

    A journal beside the files, PREFIX.journal, says which of them an interrupted run has finished; it stays until
    `forget_journal`. `progress` gets the bytes of each write; they add up to the sizes of `plan_weight_files`. Layers that
    `calibrated` has are taken from there.
    A shard of a tensor that is stored unchanged is read without the whole tensor in memory; a tensor that is made of others is
    made whole and then sharded. Weights are sharded before they are quantised.
    Raises WeightsError as `check_tp`, `match` and `Source.read` do, for values that are not finite, and for want of disk space.
    """
    layouts = plan_weight_files(config, conversion)
    producer = _TensorProducer(source, match(config, source.tensors), config, conversion, calibrated)
    folder = out / conversion.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_partials(folder, conversion.prefix)
    journal = folder / f"{conversion.prefix}.journal"
    finished = _read_journal(out, journal, layouts)
    check_space(out, sum(layout.nbytes for layout in layouts if layout.file not in finished))
    for layout in layouts:
        if layout.file in finished:
            if progress:
                progress(layout.nbytes)
            continue
        try:
            with one_thread():
                spec = write_weight_file(out, layout, producer.take, progress)
            finished[layout.file] = _Finished(layout.file, _digest(layout), spec.nbytes, spec.sha256)
            _write_journal(journal, finished)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise WeightsError(
                f"the disk is full: {out / layout.file} could not be written ({layout.nbytes} bytes); free some space and "
                f"run the same command again, it keeps the {len(finished)} of {len(layouts)} weight files that are finished"
            ) from error
        assert not producer.waiting, producer.waiting.keys()
    weights: dict[str, WeightSpec] = {}
    for layout in layouts:
        assert not weights.keys() & layout.tensors.keys()
        weights |= layout.tensors
    stored = stored_targets(config, conversion.quant, conversion.floats, conversion.tp, ascend=conversion.ascend)
    assert weights.keys() == stored.keys()
    files = {layout.file: FileSpec(nbytes=layout.nbytes, sha256=finished[layout.file].sha256) for layout in layouts}
    return Converted(weights, files)


def parameters(source: Source, config: ModelConfig) -> Callable[[str], Tensor]:
    """A function that gives each whole parameter of `config` once, in the checkpoint's dtype. It raises as `convert`."""
    return _TensorProducer(source, match(config, source.tensors), config, Conversion(prefix="")).take


def forget_journal(out: Path, prefix: str, *, tp: int = 1, rank: int = 0) -> None:
    """Remove the files that only a resumed conversion needs."""
    folder = out / rank_folder(tp, rank)
    (folder / f"{prefix}.journal").unlink(missing_ok=True)
    _remove_partials(folder, prefix)


class _TensorProducer:
    """Produces the stored tensors of one rank: reads, makes, shards, quantises and perhaps merges each parameter once."""

    def __init__(
        self,
        source: Source,
        weight_map: WeightMap,
        config: ModelConfig,
        conversion: Conversion,
        calibrated: CalibratedLayers | None = None,
    ) -> None:
        self.source, self.config, self.conversion, self.calibrated = source, config, conversion, calibrated
        self.stored_shapes = stored_shapes(config, conversion.quant, conversion.tp, ascend=conversion.ascend)
        self.owner = {part: name for name in self.stored_shapes for part in self._parts(name, ascend=conversion.ascend)}
        self.spans = {name: _span(config, name, shape, conversion) for name, shape in targets(config).items()}
        self.shapes = rank_targets(config, conversion.tp)
        self.recipes = dict(weight_map.recipes)
        self._add_pieces(config)
        self.waiting: dict[str, Tensor] = {}  # stored tensors of a parameter already read that come later in the file
        self.read: set[str] = set()

    def _add_pieces(self, config: ModelConfig) -> None:
        """What is known of lm_head, for each of its pieces."""
        first = 0
        for name in filter(lambda each: piece_of(each)[0], self.stored_shapes):
            whole, rows = piece_of(name)[0], self.stored_shapes[name][0]
            start, stop = rank_span(config, whole, targets(config)[whole], self.conversion.tp, self.conversion.rank)
            self.spans[name] = Span(0, min(start + first, stop), min(start + first + rows, stop))
            self.shapes[name], self.recipes[name] = self.stored_shapes[name], self.recipes[whole]
            first += rows

    def take(self, part: str) -> Tensor:
        if part not in self.waiting:
            self.waiting |= self._stored(self.owner[part])
        return self.waiting.pop(part)

    def _parts(self, name: str, *, ascend: bool) -> dict[str, StoredTensor]:
        return stored_parts(name, self.stored_shapes[name], self.conversion.quant, self.conversion.floats, ascend=ascend)

    def _stored(self, name: str) -> dict[str, Tensor]:
        """The stored parts of a parameter; of a merged one, members are made one after another."""
        conversion, shape = self.conversion, self.stored_shapes[name]
        packs = conversion.ascend and len(shape) == 2 and packs_features(quant_of(name, conversion.quant), shape)
        if members := members_of(name):
            values = concatenated(self._parts(name, ascend=conversion.ascend and not packs), members, self._make)
        else:
            values = self._make(name)
        return {part: packed_features(part.rpartition(".")[2], value) for part, value in values.items()} if packs else values

    def _make(self, name: str) -> dict[str, Tensor]:
        """The stored parts of a parameter before any are merged or packed."""
        parts = self._defined(name)
        if not self.conversion.ascend:
            return parts
        return {part: padded_heads(part, value, head_width(self.config, part)) for part, value in parts.items()}

    def _defined(self, name: str) -> dict[str, Tensor]:
        assert name not in self.read, name
        self.read.add(name)
        if self.calibrated and (stored := self.calibrated.parameter(name, self.conversion.rank)):
            for part, value in stored.items():
                self._check_range(part, value)
            return stored
        kind, stem = quant_of(name, self.conversion.quant), name.removesuffix(".weight")
        if kind != "none" and isinstance(self.source, PackedSource):
            parts = self._repacked(self.source, self.recipes[name], self.spans[name], kind)
            return {f"{stem}.{part}": value for part, value in parts.items()}
        tensor = _padded(self._made(self.recipes[name], self.spans[name]), self.shapes[name])
        if kind == "none":
            self._check_range(name, tensor)
            return {name: tensor}
        return {f"{stem}.{part}": value for part, value in self._quantised(kind, tensor).items()}

    def _quantised(self, kind: str, weight: Tensor) -> dict[str, Tensor]:
        if self.conversion.ascend and has_column_scales(kind, self.conversion.quant):
            return dict(zip(("qweight", "scales"), quantize_columns(weight), strict=True))
        return quantize(kind, weight)

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
        """The stored parts of a weight that is quantised in the checkpoint."""
        ((tensor, ref),) = zip(recipe.tensors, recipe.rule.sources, strict=True)
        assert recipe.rule.make is None, tensor.name
        return source.repack(tensor.name, kind, ref.rows, span)

    def _check_range(self, name: str, tensor: Tensor) -> None:
        """float16 ends at 65504; the other dtypes hold whatever a checkpoint can."""
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
    """A rank's shard of a parameter; None: the whole."""
    axis = shard_axis(config, name)
    if conversion.tp == 1 or axis is None:
        return None
    return Span(axis, *rank_span(config, name, shape, conversion.tp, conversion.rank))


def _padded(tensor: Tensor, shape: Shape) -> Tensor:
    """`tensor` with rows of zeros after its own, up to `shape`."""
    missing = shape[0] - len(tensor)
    return torch.cat((tensor, tensor.new_zeros(missing, *shape[1:]))) if missing else tensor


def _range(tensor: Tensor) -> tuple[float, float]:
    """Smallest and largest value; nan where there is one."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    buffer = torch.empty(_CHUNK, dtype=torch.float32)
    ranges = [buffer[: len(piece)].copy_(piece).aminmax() for piece in tensor.flatten().split(_CHUNK)]
    return float(torch.stack([r.min for r in ranges]).min()), float(torch.stack([r.max for r in ranges]).max())


def _tensors_of_files(config: ModelConfig, conversion: Conversion) -> Iterator[dict[str, StoredTensor]]:
    """The stored tensors of each file, in the order of `stored_shapes`; the parts of one parameter stay together."""
    tensors: dict[str, StoredTensor] = {}
    size = 0
    for name, shape in stored_shapes(config, conversion.quant, conversion.tp, ascend=conversion.ascend).items():
        parts = stored_parts(name, shape, conversion.quant, conversion.floats, ascend=conversion.ascend)
        nbytes = sum(part.nbytes for part in parts.values())
        if tensors and size + nbytes > conversion.shard_bytes:
            yield tensors
            tensors, size = {}, 0
        tensors |= parts
        size += nbytes
    yield tensors


def _digest(layout: WeightFile) -> str:
    return hashlib.sha256(layout.header).hexdigest()


def _read_journal(out: Path, path: Path, layouts: tuple[WeightFile, ...]) -> dict[str, _Finished]:
    """The finished files among `layouts`; one with a damaged line, another layout or another size is not finished."""
    planned = {layout.file: layout for layout in layouts}
    finished: dict[str, _Finished] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = msgspec.json.decode(line, type=_Finished)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        layout, file = planned.get(entry.file), out / entry.file
        if layout is None or entry.header != _digest(layout) or entry.nbytes != layout.nbytes:
            continue
        if file.is_file() and file.stat().st_size == layout.nbytes:
            finished[entry.file] = entry
    return finished


def _write_journal(path: Path, finished: dict[str, _Finished]) -> None:
    lines = b"".join(msgspec.json.encode(entry) + b"\n" for entry in finished.values())
    write_atomically(path, lines)


def _remove_partials(folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        if path.name.startswith(f"{prefix}-") and path.name.endswith(".partial"):
            path.unlink()
