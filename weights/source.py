"""A checkpoint folder, read lazily: every tensor's name, dtype and shape at once, its bytes one tensor at a time.

Bytes are read from the file into fresh memory, never mapped: mapped pages would count as resident memory, and a large
checkpoint must convert on a small machine.
"""

from __future__ import annotations

import logging
import math
import pickle
import struct
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..model_defs.config import ConfigError, irregular, parse_object
from ..runtime.shown import quoted, shown
from .tensors import FLOATS, TOWER, SourceTensor, WeightsError
from .wrappers import unwrapped

log = logging.getLogger(__name__)

# https://github.com/huggingface/safetensors#format; codes without an entry keep their own spelling.
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _SAFETENSORS_DTYPES.values()}
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
_LFS_POINTER = b"version https://git-lfs"
_ZIP_MAGIC = b"PK\x03\x04"


class Source:
    """The tensors of one checkpoint: `tensors` by name, and `files`, every weight file and index that was read."""

    def __init__(self, tensors: Mapping[str, SourceTensor], files: Iterable[Path]) -> None:
        self.tensors = dict(tensors)
        self.files = tuple(files)
        self._whole: tuple[Path, dict[str, Tensor]] | None = None  # the last file that had to be loaded whole

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The contiguous tensor `name`, or its `rows` (first, after the last), in fresh memory and the checkpoint's dtype.

        Raises WeightsError when it is not float32, float16 or bfloat16, or when the file ends before it does.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise WeightsError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}; expected float32, float16 or bfloat16: "
                "give an unquantised checkpoint"
            )
        return self.read_any(name, rows)

    def read_any(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As `read`, for tensors of integers too. Raises WeightsError when the file ends before the tensor does."""
        tensor = self.tensors[name]
        if tensor.offset is None:
            whole = self._load_whole(tensor.file)[tensor.stored or name.removeprefix(TOWER)]
            return (whole[slice(*rows)] if rows else whole).clone().contiguous()
        return _read_strided(*_cut(tensor, tensor.offset, rows))

    def _load_whole(self, file: Path) -> dict[str, Tensor]:
        if self._whole is None or self._whole[0] != file:
            self._whole = None  # frees the file before
            log.info("%s has torch's format from before 2020: loading the whole file into memory", file)
            self._whole = file, _unpickle(file)
        return self._whole[1]


def open_source(folder: Path, extra: Path | None = None) -> Source:
    """List the tensors of the checkpoint in `folder`: safetensors where there are any, else .bin; one file or several.

    `extra` is the folder of a vision tower stored apart; its tensors are listed as "tower/" + their own names. Prefixes of
    training tools (see wrappers.py) are removed from names. Raises WeightsError for missing, damaged or refused files.
    """
    tensors, files = _list_folder(folder, "")
    tensors = _unwrapped(tensors, "")
    if extra is not None:
        tower, tower_files = _list_folder(extra, TOWER)
        tensors, files = tensors | _unwrapped(tower, TOWER), files + tower_files
    return Source(tensors, files)


def _unwrapped(tensors: Mapping[str, SourceTensor], prefix: str) -> dict[str, SourceTensor]:
    """The same tensors by their names in the module itself; raises WeightsError where two have one name."""
    unwrapped_tensors: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        plain = prefix + unwrapped(own)
        if other := unwrapped_tensors.get(plain):
            raise WeightsError(
                f"{tensor.file} holds {own}, and {other.file} holds {other.stored or other.name.removeprefix(prefix)}, which "
                "mean the same; keep one of them"
            )
        unwrapped_tensors[plain] = tensor if plain == name else replace(tensor, name=plain, stored=own)
    return unwrapped_tensors


def open_file(path: Path) -> Source:
    """The tensors of one safetensors or .bin file. Raises WeightsError as `open_source`."""
    return Source(_list_file(path, ""), [path])


def _list_folder(folder: Path, prefix: str) -> tuple[dict[str, SourceTensor], list[Path]]:
    if not folder.is_dir():
        raise WeightsError(f"{shown(folder)} is not a folder; expected a checkpoint folder with safetensors or .bin weights")
    if reason := irregular(folder):
        raise WeightsError(reason)
    index, files = _weight_files(folder)
    if index is None:
        return _merge(files, prefix), files
    file_of = _read_index(index)
    indexed = [folder / name for name in dict.fromkeys(file_of.values())]
    missing = [file.name for file in indexed if not file.is_file()]
    if missing:
        raise WeightsError(
            f"{index} names {_some(missing)}, which {'is' if len(missing) == 1 else 'are'} not in {folder}; "
            "fetch the missing files"
        )
    listing = {file: _list_file(file, prefix) for file in indexed}
    lacking = [f"{name} (in {file})" for name, file in file_of.items() if prefix + name not in listing[folder / file]]
    if lacking:
        raise WeightsError(f"{index} names tensors that their files lack: {_some(lacking)}; fetch index and weights again")
    return {prefix + name: listing[folder / file][prefix + name] for name, file in file_of.items()}, [index, *indexed]


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index to follow, or else the files to read whole. Other .bin files (mm_projector.bin) only repeat tensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return None, [single]
    if index.is_file():
        return index, []
    loose = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if loose:
        return None, loose
    single, index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if single.is_file():
        return None, [single]
    if index.is_file():
        return index, []
    raise WeightsError(
        f"{folder} holds no weights; expected model.safetensors or pytorch_model.bin, whole or in shards with an index: "
        "fetch the weight files into this folder"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    _refuse_lfs_pointer(path)
    try:
        weight_map = parse_object(path.read_bytes(), path)["weight_map"]
    except (ConfigError, KeyError) as error:
        raise WeightsError(f"{path} is not an index of weights ({error!s:.200}); fetch the file again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no tensors in its weight_map; fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(f"{path} places tensor {name} in {quoted(file)}; expected the name of a file in the same folder")
    return weight_map


def _merge(files: Collection[Path], prefix: str) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        listing = _list_file(file, prefix)
        for name in listing.keys() & tensors.keys():
            raise WeightsError(
                f"{name.removeprefix(prefix)} is in both {tensors[name].file.name} and {file.name} of {file.parent}; "
                "keep one set of weight files in the folder"
            )
        tensors |= listing
    return tensors


def _list_file(path: Path, prefix: str) -> dict[str, SourceTensor]:
    _refuse_lfs_pointer(path)
    tensors = _list_safetensors(path) if path.suffix == ".safetensors" else _list_bin(path)
    return {
        prefix + name: SourceTensor(prefix + name, dtype, shape, path, offset, stride)
        for name, (dtype, shape, offset, stride) in tensors.items()
    }


_Listing = dict[str, tuple[str, tuple[int, ...], int | None, tuple[int, ...]]]  # name -> dtype, shape, offset, stride


def _list_safetensors(path: Path) -> _Listing:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise WeightsError(f"{path} is not a safetensors file or is cut short ({size} bytes); fetch the file again")
        raw = file.read(length)
    listing: _Listing = {}
    places: list[tuple[int, int, str]] = []
    try:
        for name, entry in parse_object(raw, "it").items():
            if name == "__metadata__":
                continue
            begin, stop = map(int, entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            dtype = str(_SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]))
            if min(shape, default=1) < 0 or (dtype in _DTYPES and stop - begin != math.prod(shape) * _DTYPES[dtype].itemsize):
                raise ValueError(f"tensor {name:.200} of shape {list(shape)} lies at {begin} to {stop}")
            listing[name] = dtype, shape, 8 + length + begin, _contiguous(shape)
            places.append((begin, stop, name))
        end = _end_of(places)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged safetensors header ({error!s:.300}); fetch the file again") from error
    if 8 + length + end != size:
        raise WeightsError(
            f"{path} has {size} bytes, but its header describes {8 + length + end}; it is cut short or damaged: fetch it again"
        )
    return listing


def _end_of(places: Iterable[tuple[int, int, str]]) -> int:
    """The end of the last tensor; raises ValueError unless each begins where the one before it ends, as the format demands."""
    end, before = 0, "the header"
    for begin, stop, name in sorted(places):
        if begin != end or stop < begin:
            raise ValueError(f"tensor {name:.200} lies at {begin} to {stop}, but {before:.200} ends at {end}")
        end, before = stop, name
    return end


def _list_bin(path: Path) -> _Listing:
    """Names, dtypes, shapes and file positions, without reading any weights.

    Under FakeTensorMode, torch.load notes in each storage where its bytes lie (torch's serialization notes,
    `_checkpoint_offset`). The note is checked against the zip directory, so a wrong position cannot become wrong numbers.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == _ZIP_MAGIC
    records = _zip_records(path) if zipped else {}
    with FakeTensorMode():
        state = _unpickle(path)
    listing: _Listing = {}
    for name, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        offset = None
        if zipped:
            storage = tensor.untyped_storage()
            start: int = storage._checkpoint_offset  # type: ignore[attr-defined]
            last = tensor.storage_offset() + _extent(tensor.shape, tensor.stride())
            if records.get(start, -1) < storage.nbytes() or last * tensor.itemsize > storage.nbytes():
                raise WeightsError(f"{path}: the bytes of tensor {name} are not where they should be; fetch the file again")
            offset = start + int(tensor.storage_offset()) * tensor.itemsize
        listing[name] = dtype, tuple(tensor.shape), offset, tuple(tensor.stride())
    return listing


def _zip_records(path: Path) -> dict[int, int]:
    """Position of the first byte -> size, for every record of a torch zip file."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(f"{path} is compressed; expected a file as torch.save writes it: fetch it again")
                if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                    raise WeightsError(f"{path} was saved on a big-endian machine; save it again on a little-endian one")
                file.seek(info.header_offset + 26)  # local header: 26 bytes, then the lengths of name and extra field
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                records[info.header_offset + 30 + name_length + extra_length] = info.file_size
    except (zipfile.BadZipFile, struct.error, EOFError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({error}); fetch the file again") from error
    return records


def _unpickle(path: Path) -> dict[str, Tensor]:
    """A .bin file's tensors; anything but plain tensors by name is refused before it can do anything."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{path} was refused by torch.load(weights_only=True): it is damaged or holds more than tensors ({reason}); "
            "fetch it again from a source you trust, or use the safetensors form"
        ) from error
    except (RuntimeError, EOFError, KeyError, AttributeError, AssertionError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is cut short or damaged ({error!r:.200}); fetch the file again") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path} holds a {type(state).__name__}; expected tensors by name, as saved from a state_dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise WeightsError(
                f"{path}: entry {quoted(name)} is not a plain tensor; expected tensors by name, as in a state_dict"
            )
    return dict(state)


def _cut(tensor: SourceTensor, offset: int, rows: tuple[int, int] | None) -> tuple[SourceTensor, int]:
    """Some rows of a tensor as a tensor of their own, and the position of its first element."""
    if rows is None:
        return tensor, offset
    first, stop = rows
    assert 0 <= first <= stop <= tensor.shape[0], (tensor, rows)
    offset += first * tensor.stride[0] * _DTYPES[tensor.dtype].itemsize
    return replace(tensor, shape=(stop - first, *tensor.shape[1:])), offset


def _read_strided(tensor: SourceTensor, offset: int) -> Tensor:
    dtype = _DTYPES[tensor.dtype]
    flat = torch.empty(_extent(tensor.shape, tensor.stride), dtype=dtype)
    view = flat.view(torch.uint8).numpy().data
    with tensor.file.open("rb") as file:
        file.seek(offset)
        count = 0
        while count < len(view) and (n := file.readinto(view[count:])):
            count += n
    if count < len(view):
        raise WeightsError(f"{tensor.file} ends inside tensor {tensor.name}; the file is cut short: fetch it again")
    return flat.as_strided(tensor.shape, tensor.stride).contiguous()


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _extent(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements from the first of a strided tensor to its last, both counted."""
    pairs = list(zip(shape, stride, strict=True))
    return 0 if any(n == 0 for n, _ in pairs) else 1 + sum((n - 1) * step for n, step in pairs)


def _refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(
                f"{path} is a git-lfs pointer, not the weights themselves; run `git lfs pull` there or fetch the file again"
            )


def _some(names: Collection[str], limit: int = 5) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    return ", ".join(map(shown, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
