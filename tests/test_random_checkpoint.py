"""Random checkpoints: whole, different in every tensor, repeatable, and never in place of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from staticvl.model_defs.config import read_config
from staticvl.tools.random_checkpoint import main
from staticvl.weights.convert import convert
from staticvl.weights.rules import match, targets
from staticvl.weights.source import open_source

from .checkpoints import Tiny, tiny_llava


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_llava(tmp_path_factory.mktemp("config"))


def write(tiny: Tiny, out: Path, *options: str) -> dict[str, torch.Tensor]:
    assert main([str(tiny.folder), "--out", str(out), *options]) == 0
    source = open_source(out)
    return {name: source.read(name) for name in source.tensors}


def test_it_is_a_checkpoint_of_the_same_form(tmp_path: Path, tiny: Tiny) -> None:
    tensors = write(tiny, tmp_path / "out")
    reference = open_source(tiny.folder).tensors
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {n: t.shape for n, t in reference.items()}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    copied = {p.name for p in tiny.folder.iterdir()} - {"model.safetensors"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == copied | {"model.safetensors"}
    assert all((tmp_path / "out" / n).read_bytes() == (tiny.folder / n).read_bytes() for n in copied)
    config = read_config(tmp_path / "out")
    assert match(config, open_source(tmp_path / "out").tensors).tensors.keys() == targets(config).keys()
    convert(open_source(tmp_path / "out"), config, tmp_path / "artifact", quant="w8a16", prefix="k")


def test_transformers_loads_it(tmp_path: Path, tiny: Tiny) -> None:
    tensors = write(tiny, tmp_path / "out", "--dtype", "float32", "--shard-gb", "0.0002")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, tensors["language_model.lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values(tmp_path: Path, tiny: Tiny, dtype: str) -> None:
    tensors = write(tiny, tmp_path / "out", "--dtype", dtype, "--scale", "0.05")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    head, norm = tensors["language_model.lm_head.weight"].float(), tensors["language_model.model.norm.weight"].float()
    assert abs(head.mean()) < 0.002 and abs(head.std() - 0.05) < 0.002
    assert abs(norm.mean() - 1) < 0.03 and 0.03 < norm.std() < 0.07
    large = [t.flatten()[:48].float().tolist() for t in tensors.values() if t.numel() >= 48]
    assert len({tuple(values) for values in large}) == len(large) > 30, "every tensor is different"


def test_sharding_does_not_change_the_weights_and_a_seed_does(tmp_path: Path, tiny: Tiny) -> None:
    one = write(tiny, tmp_path / "one")
    many = write(tiny, tmp_path / "many", "--shard-gb", "0.0001")
    other = write(tiny, tmp_path / "other", "--seed", "1")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["weight_map"].keys() == one.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_original_layout_has_its_tower_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tiny_llava(tmp_path / "config", layout="original")
    settings = json.loads((known.folder / "config.json").read_text())
    (known.folder / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": "clip"}))
    out = tmp_path / "out"
    assert main([str(known.folder), "--out", str(out)]) == 0
    assert f"compile with --vision-tower {out / 'vision_tower'}" in capsys.readouterr().out
    config = read_config(out, vision_tower=out / "vision_tower")
    assert config.vision == read_config(known.folder).vision
    plan = match(config, open_source(out, out / "vision_tower").tensors)
    assert plan.tensors.keys() == targets(config).keys()
    assert plan.tensors["vision.class_embedding"].file.parent == out / "vision_tower"
    assert json.loads((out / "vision_tower" / "preprocessor_config.json").read_text())["crop_size"] == 28


def test_nothing_is_overwritten(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    write(tiny, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main([str(tiny.folder), "--out", str(tmp_path / "out"), "--seed", "9"]) == 2
    assert "exists and is not empty; choose another --out" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert main([str(tiny.folder), "--out", str(tmp_path / "out" / "config.json")]) == 2


def test_a_folder_without_a_tokenizer(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((tiny.folder / "config.json").read_bytes())
    assert main([str(tmp_path / "config"), "--out", str(tmp_path / "out")]) == 0
    assert "has no tokenizer.json or tokenizer.model, which compiling needs" in capsys.readouterr().out


def test_errors(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no config.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([str(tiny.folder), "--out", str(tmp_path / "out"), "--shard-gb", "0"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert main([str(tiny.folder), "--out", str(tmp_path / "out")]) == 2
    assert "but only 10 are free" in capsys.readouterr().err
