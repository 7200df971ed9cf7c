"""Conversion: the numbers arrive bit for bit, and an interrupted run ends like one that was not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.weights import writer
from staticvl.weights.convert import Conversion, Converted, convert, forget_journal, plan_weight_files
from staticvl.weights.quantize import dequantize, quantize
from staticvl.weights.source import Source, open_source
from staticvl.weights.storage import QUANTS, quant_of, stored_targets
from staticvl.weights.tensors import StoredTensor, WeightsError
from staticvl.weights.weight_map import targets

from .checkpoints import Tiny, tiny_llava, write_weights

SHARD_BYTES = 100_000  # several files for a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llava(tmp_path_factory.mktemp("convert"), sharded=True)


@pytest.fixture(scope="module")
def config(tiny: Tiny) -> ModelConfig:
    return read_config(tiny.folder)


def run(tiny: Tiny, config: ModelConfig, out: Path, quant: str = "none", **options: Any) -> Converted:
    source = open_source(tiny.folder, tiny.vision_tower)
    progress = options.pop("progress", None)
    conversion = Conversion(**{"quant": quant, "prefix": "k", "shard_bytes": SHARD_BYTES} | options)
    return convert(source, config, out, conversion, progress=progress)


def load(out: Path, converted: Converted) -> dict[str, Tensor]:
    return {name: tensor for file in converted.files for name, tensor in load_file(out / file).items()}


def contents(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((out / "weights").glob("*.safetensors"))}


def expected_weights(model: Any) -> dict[str, Tensor]:
    """Our names from transformers' own modules of either LLaVA, written out without the tables under test."""
    llava, expected = model.model, {}
    text, vision = llava.language_model, llava.vision_tower
    expected["text.embed.weight"] = text.embed_tokens.weight
    expected["text.norm.weight"] = text.norm.weight
    expected["text.lm_head.weight"] = model.lm_head.weight
    for i, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attn_norm": layer.input_layernorm, "mlp_norm": layer.post_attention_layernorm,
            "attn.q": attention.q_proj, "attn.k": attention.k_proj, "attn.v": attention.v_proj, "attn.o": attention.o_proj,
            "mlp.gate": mlp.gate_proj, "mlp.up": mlp.up_proj, "mlp.down": mlp.down_proj,
        }  # fmt: skip
        expected |= {f"text.layers.{i}.{name}.weight": part.weight for name, part in parts.items()}
    expected["vision.class_embedding"] = vision.embeddings.class_embedding
    expected["vision.patch.weight"] = vision.embeddings.patch_embedding.weight
    expected["vision.positions.weight"] = vision.embeddings.position_embedding.weight
    modules = {"vision.pre_norm": vision.pre_layrnorm}
    for i, layer in enumerate(vision.encoder.layers[:-1]):
        attention, at = layer.self_attn, f"vision.layers.{i}"
        modules |= {
            f"{at}.attn_norm": layer.layer_norm1, f"{at}.mlp_norm": layer.layer_norm2,
            f"{at}.attn.q": attention.q_proj, f"{at}.attn.k": attention.k_proj, f"{at}.attn.v": attention.v_proj,
            f"{at}.attn.o": attention.out_proj, f"{at}.mlp.up": layer.mlp.fc1, f"{at}.mlp.down": layer.mlp.fc2,
        }  # fmt: skip
    modules |= {"projector.up": llava.multi_modal_projector.linear_1, "projector.down": llava.multi_modal_projector.linear_2}
    for name, module in modules.items():
        expected |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: tensor.detach() for name, tensor in expected.items()}


CHECKPOINTS: list[dict[str, Any]] = [
    {"names": "old", "sharded": True},
    {"names": "new"},
    {"names": "saved", "dtype": torch.bfloat16},
    {"names": "old", "fmt": "bin", "dtype": torch.float16},
    {"layout": "original", "fmt": "bin", "sharded": True, "dtype": torch.float16},
    {"layout": "original"},
]


@pytest.mark.parametrize("options", CHECKPOINTS, ids=lambda o: "-".join(map(str, o.values())))
def test_weights_are_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    tiny = tiny_llava(tmp_path / "checkpoint", **options)
    config = read_config(tiny.folder, vision_tower=tiny.vision_tower)
    converted = run(tiny, config, tmp_path / "out")
    got, expected = load(tmp_path / "out", converted), expected_weights(tiny.model)
    assert got.keys() == expected.keys() == converted.weights.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == torch.float32 and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("quant", QUANTS[1:])
def test_quantised_weights(tmp_path: Path, tiny: Tiny, config: ModelConfig, quant: str) -> None:
    got, expected = load(tmp_path, run(tiny, config, tmp_path, quant)), expected_weights(tiny.model)
    assert {n: (tuple(t.shape), str(t.dtype)) for n, t in got.items()} == {
        n: (s.shape, f"torch.{s.dtype}") for n, s in stored_targets(config, quant).items()
    }
    for name, tensor in expected.items():
        if name in got:
            assert torch.equal(got[name], tensor), name
            continue
        stem, kind = name.removesuffix(".weight"), quant_of(name, quant)
        parts = quantize(kind, tensor)
        assert all(torch.equal(got[f"{stem}.{key}"], value) for key, value in parts.items()), name
        near = dequantize(kind, parts, tensor.shape[1])
        assert (near - tensor).abs().max() < tensor.abs().max() / (6 if kind.startswith("w4a16") else 200)


@pytest.mark.parametrize("quant", ["none", "w8a8+vision"])
def test_files_are_as_planned(tmp_path: Path, tiny: Tiny, config: ModelConfig, quant: str) -> None:
    converted = run(tiny, config, tmp_path, quant)
    shards = plan_weight_files(config, Conversion(quant=quant, prefix="k", shard_bytes=SHARD_BYTES))
    assert [shard.file for shard in shards] == [f"weights/k-{i + 1:05d}.safetensors" for i in range(len(shards))] and len(
        shards
    ) > 2
    assert list(converted.files) == [shard.file for shard in shards]
    for shard in shards:
        path, spec = tmp_path / shard.file, converted.files[shard.file]
        assert path.stat().st_size == spec.nbytes == shard.nbytes
        assert hashlib.sha256(path.read_bytes()).hexdigest() == spec.sha256
        assert len(shard.header) % 64 == 0
        payload = shard.nbytes - len(shard.header)
        assert payload <= SHARD_BYTES or len({name.rsplit(".", 1)[0] for name in shard.tensors}) == 1
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(shard.tensors)
    for name, spec in converted.weights.items():
        data = (tmp_path / spec.file).read_bytes()[spec.offset : spec.offset + spec.nbytes]
        tensor = load_file(tmp_path / spec.file)[name]
        assert np.array_equal(np.frombuffer(data, spec.dtype).reshape(spec.shape), tensor.numpy()), name
        assert spec.offset % min(64, spec.nbytes & -spec.nbytes) == 0, name
    for shard in shards:
        parts = {name.rsplit(".", 1)[0] for name in shard.tensors if name.endswith(".qweight")}
        assert all(f"{stem}.scales" in shard.tensors for stem in parts)


def test_odd_sizes_come_after_those_that_keep_the_alignment() -> None:
    sizes = {"odd": 3, "first": 64, "half": 8, "second": 16}  # float32 elements
    shard = writer.lay_out("f", {name: StoredTensor("float32", (n,)) for name, n in sizes.items()})
    assert list(shard.tensors) == ["first", "second", "half", "odd"]
    assert [spec.offset - len(shard.header) for spec in shard.tensors.values()] == [0, 256, 320, 352]


def test_shard_size_changes_files_but_not_tensors(tmp_path: Path, tiny: Tiny, config: ModelConfig) -> None:
    one, many = run(tiny, config, tmp_path / "one", shard_bytes=1 << 30), run(tiny, config, tmp_path / "many", shard_bytes=1)
    assert len(one.files) == 1 and len(many.files) == len(targets(config))
    a, b = load(tmp_path / "one", one), load(tmp_path / "many", many)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("quant", ["none", "w8a8+vision"])
def test_each_tensor_is_read_once(
    tmp_path: Path, tiny: Tiny, config: ModelConfig, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    plain = Source.read

    def counted(self: Source, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        reads[name] += 1
        return plain(self, name, rows)

    monkeypatch.setattr(Source, "read", counted)
    run(tiny, config, tmp_path, quant)
    assert set(reads.values()) == {1} and len(reads) == len(targets(config))


def test_progress_adds_up(tmp_path: Path, tiny: Tiny, config: ModelConfig) -> None:
    total = sum(shard.nbytes for shard in plan_weight_files(config, Conversion(prefix="k", shard_bytes=SHARD_BYTES)))
    for _ in range(2):  # the second run finds every file finished
        steps: list[int] = []
        run(tiny, config, tmp_path, progress=steps.append)
        assert sum(steps) == total


# --- Resuming ------------------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


def stop_after(files: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Break off the run in the middle of the file after that many; returns the names of the files begun."""
    begun: list[str] = []
    plain = writer._contents

    def contents(shard: Any, read: Any) -> Any:
        begun.append(shard.file)
        for i, data in enumerate(plain(shard, read)):
            if len(begun) > files and i == 2:
                raise StopError
            yield data

    monkeypatch.setattr(writer, "_contents", contents)
    return begun


@pytest.mark.parametrize("quant", ["none", "w8a8+vision"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, tiny: Tiny, config: ModelConfig, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, config, tmp_path / "whole", quant)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(StopError):
            run(tiny, config, tmp_path / "broken", quant)
    folder = tmp_path / "broken" / "weights"
    assert sorted(p.name for p in folder.iterdir()) == ["k-00001.safetensors", "k-00002.safetensors", "k.journal"]
    times = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    with monkeypatch.context() as patch:
        begun = stop_after(99, patch)
        resumed = run(tiny, config, tmp_path / "broken", quant)
    assert begun == list(whole.files)[2:], "finished files are not written again"
    assert all((folder / name).stat().st_mtime_ns == time for name, time in times.items())
    assert resumed == whole and contents(tmp_path / "broken") == contents(tmp_path / "whole")
    forget_journal(tmp_path / "broken", "k")
    assert sorted(p.name for p in folder.iterdir()) == sorted(Path(file).name for file in whole.files)


def damage_line(folder: Path) -> None:
    lines = (folder / "k.journal").read_text().splitlines()
    (folder / "k.journal").write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]))


def damage_size(folder: Path) -> None:
    os.truncate(folder / "k-00002.safetensors", 100)


def damage_file(folder: Path) -> None:
    (folder / "k-00002.safetensors").unlink()


def damage_layout(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "k.journal").read_text().splitlines()]
    lines[1]["header"] = "0" * 64
    (folder / "k.journal").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("damage", [damage_line, damage_size, damage_file, damage_layout])
def test_a_damaged_file_or_journal_line_is_written_again(
    tmp_path: Path, tiny: Tiny, config: ModelConfig, damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny, config, tmp_path)
    before = contents(tmp_path)
    damage(tmp_path / "weights")
    begun = stop_after(99, monkeypatch)
    assert run(tiny, config, tmp_path) == whole
    assert begun == ["weights/k-00002.safetensors"] and contents(tmp_path) == before


def test_another_shard_size_does_not_mix_with_old_files(tmp_path: Path, tiny: Tiny, config: ModelConfig) -> None:
    run(tiny, config, tmp_path)
    fewer = run(tiny, config, tmp_path, shard_bytes=3 * SHARD_BYTES)
    got, expected = load(tmp_path, fewer), expected_weights(tiny.model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_partial_file_of_a_killed_run_is_removed(tmp_path: Path, tiny: Tiny, config: ModelConfig) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("k-00001.safetensors.partial", "k-00077.safetensors.partial", "other-00001.safetensors.partial"):
        (folder / name).write_bytes(b"x")
    run(tiny, config, tmp_path)
    assert [p.name for p in folder.glob("*.partial")] == ["other-00001.safetensors.partial"], "other keys are not ours"


# --- Errors --------------------------------------------------------------------------------------------------------------


def test_too_little_disk_space_is_said_before_writing(
    tmp_path: Path, tiny: Tiny, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = plan_weight_files(config, Conversion(prefix="k", shard_bytes=SHARD_BYTES))
    needed = sum(shard.nbytes for shard in shards)
    usage = type("Usage", (), {"free": needed - 1})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match=rf"needs {needed} bytes, but only {needed - 1} are free; free some space"):
        run(tiny, config, tmp_path)
    assert not list((tmp_path / "weights").iterdir())
    usage.free = needed
    run(tiny, config, tmp_path)
    usage.free = 0
    run(tiny, config, tmp_path)  # everything is there: no room is needed


class FullDisk:
    """A file that takes `room` bytes in all."""

    def __init__(self, file: Any, room: list[int]) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: Any) -> int:
        self.room[0] -= len(data)
        if self.room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def test_a_disk_that_fills_up(tmp_path: Path, tiny: Tiny, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = plan_weight_files(config, Conversion(prefix="k", shard_bytes=SHARD_BYTES))
    room = [shards[0].nbytes + shards[1].nbytes + shards[2].nbytes // 2]
    plain = Path.open

    def limited(self: Path, mode: str = "r", **options: Any) -> Any:
        file = plain(self, mode, **options)
        return FullDisk(file, room) if self.name.endswith("safetensors.partial") else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        with pytest.raises(
            WeightsError, match=rf"the disk is full: \S*k-00003\.safetensors .* keeps the 2 of {len(shards)} weight files"
        ):
            run(tiny, config, tmp_path)
    assert not list((tmp_path / "weights").glob("*.partial"))
    run(tiny, config, tmp_path)
    whole = run(tiny, config, tmp_path / "whole")
    assert contents(tmp_path) == contents(tmp_path / "whole") and len(contents(tmp_path)) == len(whole.files)


def test_other_write_errors_are_passed_on(
    tmp_path: Path, tiny: Tiny, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="bad disk"):
        run(tiny, config, tmp_path)
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("quant", ["none", "w8a8+vision"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, config: ModelConfig, quant: str, value: float) -> None:
    bad = tiny_llava(tmp_path / "checkpoint", sharded=True)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    file = open_source(bad.folder).tensors[name].file
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=rf"{file}: tensor {name} holds values that are not finite; fetch the file again"):
        run(bad, config, tmp_path, quant)
    assert not list((tmp_path / "weights").glob("*.partial"))


def test_torch_keeps_its_threads(tmp_path: Path, tiny: Tiny, config: ModelConfig) -> None:
    before = torch.get_num_threads()
    run(tiny, config, tmp_path)
    assert torch.get_num_threads() == before


MEASURE = """
import sys
from pathlib import Path
from staticvl.weights.source import open_source
from staticvl.weights.tensors import StoredTensor
from staticvl.weights.writer import lay_out, write_weight_file

def resident(key):  # KB; VmHWM is the largest VmRSS so far
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def copy(folder, names):
    source = open_source(folder)
    stored = {name: StoredTensor("float32", source.tensors[name].shape) for name in names or source.tensors}
    write_weight_file(folder, lay_out("out.safetensors", stored), source.read)

folders = list(map(Path, sys.argv[1:]))
for folder in folders:
    copy(folder, ["small"])  # whatever is loaded on first use
before = resident("VmRSS")
for folder in folders:
    copy(folder, None)
    (folder / "out.safetensors").unlink()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Ten tensors of 8 MB in half precision, 160 MB as written; the allocator may hold on to two or three, never to all."""
    tensors = {f"t{i}": torch.zeros(4 << 20, dtype=torch.float16) for i in range(10)} | {"small": torch.zeros(3)}
    for fmt in ("safetensors", "bin"):
        (tmp_path / fmt).mkdir()
        write_weights(tmp_path / fmt, tensors, fmt=fmt, sharded=False)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "safetensors"), str(tmp_path / "bin")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 << 10, f"{done.stdout} KB"
