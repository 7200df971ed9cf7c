"""Reading checkpoints: every format gives the same tensors, and every kind of damage an error that says what to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.weights import source as source_module
from staticvl.weights.source import Source, open_source
from staticvl.weights.tensors import WeightsError

from .checkpoints import tiny_llava, write_weights


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, 4, 2, generator=generator).half(),
        "c.bias": torch.randn(9, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
    }


def assert_same(source: Source, expected: dict[str, Tensor]) -> None:
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        spec, got = source.tensors[name], source.read(name)
        assert (spec.name, spec.shape, f"torch.{spec.dtype}") == (name, tuple(tensor.shape), str(tensor.dtype))
        assert got.dtype == tensor.dtype and got.is_contiguous()
        assert torch.equal(got, tensor), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_reads_what_was_written(tmp_path: Path, fmt: str, sharded: bool) -> None:
    expected = some_tensors()
    write_weights(tmp_path, expected, fmt=fmt, sharded=sharded)
    source = open_source(tmp_path)
    assert_same(source, expected)
    assert sorted(source.files) == sorted(tmp_path.iterdir())


def test_reads_loose_safetensors_without_an_index(tmp_path: Path) -> None:
    expected = some_tensors()
    for i, (name, tensor) in enumerate(expected.items()):
        save_file({name: tensor}, tmp_path / f"part{i}.safetensors")
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert_same(open_source(tmp_path), expected)


def test_a_tensor_in_two_loose_files_is_refused(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"a is in both one\.safetensors and two\.safetensors"):
        open_source(tmp_path)


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.zeros(2)}, fmt="bin", sharded=False)
    write_weights(tmp_path, {"a": torch.ones(2)}, fmt="safetensors", sharded=False)
    assert open_source(tmp_path).read("a").tolist() == [1, 1]


def test_the_repeated_projector_file_is_skipped(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "llava", layout="original", fmt="bin", sharded=True)
    assert (tiny.folder / "mm_projector.bin").is_file()
    assert "mm_projector.bin" not in {path.name for path in open_source(tiny.folder).files}


def test_a_tower_is_listed_apart(tmp_path: Path) -> None:
    for folder, value in (("llava", 1.0), ("clip", 2.0)):
        (tmp_path / folder).mkdir()
        save_file({"same.name": torch.full((2,), value)}, tmp_path / folder / "model.safetensors")
    source = open_source(tmp_path / "llava", tmp_path / "clip")
    assert_same(source, {"same.name": torch.full((2,), 1.0), "tower/same.name": torch.full((2,), 2.0)})


@pytest.mark.parametrize("zipped", [None, True, False], ids=["safetensors", "zip", "before 2020"])
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "base_model.model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module.base_model.model._orig_mod.",
    ],
)
def test_prefixes_of_training_tools(tmp_path: Path, prefix: str, zipped: bool | None) -> None:
    expected = some_tensors()
    wrapped = {prefix + name: tensor for name, tensor in expected.items()}
    if zipped is None:
        write_weights(tmp_path, wrapped, fmt="safetensors", sharded=True)
    else:
        torch.save(wrapped, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same(open_source(tmp_path), expected)


def test_prefixes_as_torch_writes_them(tmp_path: Path) -> None:
    """Whole modules and some of their parts compiled by torch, in DataParallel, in any order; a tower apart as well."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4)))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1][0] = torch.compile(model[1][0])  # type: ignore[index]
    for wrapped in (model, torch.compile(model), torch.nn.DataParallel(torch.compile(model))):
        state = wrapped.state_dict()  # type: ignore[attr-defined]
        assert state.keys() != expected.keys()
        save_file(state, tmp_path / "model.safetensors")
        assert_same(open_source(tmp_path), expected)
    (tmp_path / "tower").mkdir()
    save_file(state, tmp_path / "tower" / "model.safetensors")
    assert open_source(tmp_path, tmp_path / "tower").tensors.keys() == {*expected, *(f"tower/{name}" for name in expected)}


def test_one_name_with_and_without_a_prefix(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"holds (module\.)?a, and .* holds (module\.)?a, which mean the same; keep one"):
        open_source(tmp_path)


def strided_tensors() -> dict[str, Tensor]:
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    return {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "rows": base[1:4],
        "block": base[2:, 3:9:2],
        "expanded": torch.tensor([3.0, 4.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_views_and_shared_storages(tmp_path: Path, zipped: bool, caplog: pytest.LogCaptureFixture) -> None:
    tensors = strided_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.INFO, "staticvl.weights.source"):
        assert_same(open_source(tmp_path), tensors)
    assert ("loading the whole file" in caplog.text) is not zipped


def test_bin_written_before_offsets_could_be_computed(tmp_path: Path) -> None:
    """Records of older torch versions lie elsewhere: no alignment note, and padding in the zip's extra field."""
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "new.bin")
    with zipfile.ZipFile(tmp_path / "new.bin") as new, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as old:
        for info in new.infolist():
            if not info.filename.endswith((".format_version", ".storage_alignment", "byteorder", "serialization_id")):
                moved = zipfile.ZipInfo(info.filename.replace("new/", "archive/"))
                moved.extra = b"FB\x05\x00ZZZZZ"
                old.writestr(moved, new.read(info))
    assert_same(open_source(tmp_path), tensors)


def test_reading_a_tensor_maps_no_file(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.ones(1 << 16)}, fmt="bin", sharded=False)
    source = open_source(tmp_path)
    kept = source.read("a")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert kept.sum() == 1 << 16


# --- Errors ------------------------------------------------------------------------------------------------------------


def test_missing_folder_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a folder; expected a checkpoint folder"):
        open_source(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"holds no weights; expected model\.safetensors or pytorch_model\.bin"):
        open_source(tmp_path)


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_missing_shard(tmp_path: Path, fmt: str) -> None:
    write_weights(tmp_path, some_tensors(), fmt=fmt, sharded=True)
    next(tmp_path.glob(f"*-00002-*.{fmt}")).unlink()
    with pytest.raises(
        WeightsError, match=rf"index\.json names \S*-00002-of-\S*{fmt}, which is not in .*; fetch the missing files"
    ):
        open_source(tmp_path)


def test_index_names_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    write_weights(tmp_path, some_tensors(), fmt="safetensors", sharded=True)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(
        WeightsError, match=r"lack: ghost \(in model-00001-of-00002\.safetensors\); fetch index and weights again"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an index of weights"),
        ("[]", "is not an index of weights"),
        ('{"weight_map": {}}', "has no tensors in its weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "expected the name of a file in the same folder"),
    ],
)
def test_damaged_index(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(some_tensors(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors .*cut short.*fetch"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        b"not json",
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[3],"data_offsets":[2,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"XX","shape":[1],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}',
        b'{"a":[1]}',
    ],
)
def test_damaged_safetensors_header(tmp_path: Path, entry: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(8))
    with pytest.raises(WeightsError, match=r"model\.safetensors has a damaged safetensors header .*; fetch the file again"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         "tensor b lies at 0 to 8, but a ends at 8"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "tensor a lies at 4 to 8, but the header ends at 0"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}',
         "'a' is there twice"),
    ],
)  # fmt: skip
def test_tensors_that_hide_each_other(tmp_path: Path, entry: bytes, message: str) -> None:
    """The safetensors library reads none of these either, except that of two entries of one name it takes the last."""
    (tmp_path / "model.safetensors").write_bytes(len(entry).to_bytes(8, "little") + entry + bytes(8))
    with pytest.raises(WeightsError, match=message):
        open_source(tmp_path)
    if "twice" not in message:
        with pytest.raises(SafetensorError):
            load_file(tmp_path / "model.safetensors")


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=r"'a' is there twice, as 'one\.safetensors' and 'two\.safetensors'"):
        open_source(tmp_path)


def make_irregular(path: Path, kind: str) -> None:
    match kind:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a device":
            path.symlink_to("/dev/zero")
        case "a socket":
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
                bound.bind(str(path))
        case _:
            path.symlink_to(path.with_name("gone"))


IRREGULAR = ["a pipe", "a folder", "a device", "a socket", "a link to nothing"]


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("name", ["model.safetensors", "loose.safetensors", "pytorch_model.bin.index.json"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str, name: str) -> None:
    """Nor passed over for another file."""
    write_weights(tmp_path, some_tensors(), fmt="bin", sharded=False)
    make_irregular(tmp_path / name, kind)
    with pytest.raises(WeightsError, match=f"{name} is {kind}.*; expected a file"):
        open_source(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_truncated_bin(tmp_path: Path, zipped: bool, part: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin .*damaged.*fetch"):
        open_source(tmp_path).read("a")


def test_a_file_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(WeightsError, match="ends inside tensor a"):
        source.read("a")


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["ATTACK_TARGET"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_that_runs_code_is_refused(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTACK_TARGET", str(tmp_path / "owned"))
    torch.save({"a": Attack()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"refused by torch\.load\(weights_only=True\).*safetensors form"):
        open_source(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"state_dict": {"a": torch.ones(1)}}, {"a": torch.eye(2).to_sparse()}])
def test_a_bin_of_another_form_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="expected tensors by name, as"):
        open_source(tmp_path)


@pytest.mark.parametrize("shift", [1, 64])
def test_a_bin_whose_bytes_lie_elsewhere_is_refused(tmp_path: Path, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    plain = source_module._zip_records
    moved = {start + shift: size for start, size in plain(tmp_path / "pytorch_model.bin").items()}
    monkeypatch.setattr(source_module, "_zip_records", lambda _: moved)
    with pytest.raises(WeightsError, match="the bytes of tensor a are not where they should be; fetch the file again"):
        open_source(tmp_path)


def test_a_compressed_bin_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(WeightsError, match=r"is compressed; expected a file as torch\.save writes it"):
        open_source(tmp_path)


def test_a_big_endian_bin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(4)}, tmp_path / "little.bin")
    with zipfile.ZipFile(tmp_path / "little.bin") as little, zipfile.ZipFile(path, "w") as big:
        for name in little.namelist():
            big.writestr(name, b"big" if name.endswith("byteorder") else little.read(name))
    with pytest.raises(WeightsError, match="saved on a big-endian machine"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4988025760\n")
    with pytest.raises(WeightsError, match="is a git-lfs pointer, not the weights themselves; run `git lfs pull`"):
        open_source(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float8_e4m3fn])
def test_unsupported_dtypes_are_listed_but_not_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.ones(2).to(dtype), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    with pytest.raises(WeightsError, match=r"tensor a has dtype \S+; expected float32, float16 or bfloat16"):
        source.read("a")
    assert source.read("b").item() == 1


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "llava", dtype=torch.float16)
    assert_same(open_source(tiny.folder), load_file(tiny.folder / "model.safetensors"))
