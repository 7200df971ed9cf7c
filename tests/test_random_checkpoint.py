"""Random checkpoints: whole, different in every tensor, repeatable, and never in place of something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from staticvl.compiler.tokenizer_config import read_tokenizer, tokenizer_file
from staticvl.model_defs.config import read_config, read_json
from staticvl.tools.development.random_checkpoint import main
from staticvl.tools.known_models import write_known_model
from staticvl.tools.random_tokenizers import write_tokenizer
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.source import open_source
from staticvl.weights.weight_map import match, targets

from .checkpoints import Tiny, tiny_llava
from .tiny_families import GOLDEN_QWEN, mllama_model, save


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
    assert {t.dtype for t in tensors.values()} == {torch.float32}, "as config.json says"
    copied = {p.name for p in tiny.folder.iterdir()} - {"model.safetensors"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == copied | {"model.safetensors"}
    assert all((tmp_path / "out" / n).read_bytes() == (tiny.folder / n).read_bytes() for n in copied)
    config = read_config(tmp_path / "out")
    assert match(config, open_source(tmp_path / "out").tensors).recipes.keys() == targets(config).keys()
    convert(open_source(tmp_path / "out"), config, tmp_path / "artifact", Conversion(quant="w8a16", prefix="k"))


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
    assert plan.recipes.keys() == targets(config).keys()
    assert plan.recipes["vision.class_embedding"].tensors[0].file.parent == out / "vision_tower"
    assert json.loads((out / "vision_tower" / "preprocessor_config.json").read_text())["crop_size"] == 28


def test_nothing_is_overwritten(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    write(tiny, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main([str(tiny.folder), "--out", str(tmp_path / "out"), "--seed", "9"]) == 2
    assert "exists and is not empty; choose another --out" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert main([str(tiny.folder), "--out", str(tmp_path / "out" / "config.json")]) == 2


# --- The other families ----------------------------------------------------------------------------------------------------


def _small_mllama(folder: Path) -> Path:
    """Sizes of a tiny model with the vocabulary of the published ones."""
    save(mllama_model(), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= {"vocab_size": 128256, "hidden_size": 8, "num_attention_heads": 4, "head_dim": 2}
    settings["text_config"] |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "pad_token_id": 128004}
    (folder / "config.json").write_text(json.dumps(settings | {"image_token_index": 128256, "torch_dtype": "bfloat16"}))
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def _small_qwen(folder: Path) -> Path:
    """Of the same kind; the file of the tokenizer is left behind."""
    folder.mkdir()
    settings = json.loads((GOLDEN_QWEN / "config.json").read_text())
    settings["visual"]["image_start_id"] = 151857
    settings |= {"vocab_size": 151936, "hidden_size": 8, "kv_channels": 2, "intermediate_size": 8}
    settings["visual"] |= {"output_dim": 8}
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copyfile(GOLDEN_QWEN / "generation_config.json", folder / "generation_config.json")
    return folder


def _small_llava_next(folder: Path) -> Path:
    write_known_model("llava-v1.6-vicuna-7b-hf", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"] |= {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    settings["text_config"] |= {"num_key_value_heads": 2}
    settings["vision_config"] |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {"mllama": _small_mllama, "qwen_vl": _small_qwen, "llava_next": _small_llava_next}
TEXTS = (
    "What is in the picture? Two red circles; 1234567 of them.",
    "图中的狗是什么品种？ 😀\n\n\ttabs  and blanks",
    "naïve Ω",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    folder, out = FAMILIES[family](tmp_path / "config"), tmp_path / "out"
    assert main([str(folder), "--out", str(out)]) == 0
    config, source = read_config(out), open_source(out)
    assert config.family == family
    assert match(config, source.tensors).recipes.keys() == targets(config).keys()
    named = json.loads((folder / "config.json").read_text())
    expected = named.get("torch_dtype") or named["text_config"]["torch_dtype"]
    assert {t.dtype for t in source.tensors.values()} == {expected}
    norms = [n for n, s in targets(config).items() if n.endswith("norm.weight")]
    converted = convert(source, config, tmp_path / "artifact", Conversion(prefix="k"))
    tensors = {n: t for file in converted.files for n, t in load_file(tmp_path / "artifact" / file).items()}
    assert norms and all(0.8 < tensors[name].mean() < 1.2 for name in norms), "norms neither swallow nor blow up"
    assert all(0.3 < tensors[name].item() < 0.6 for name in tensors if name.endswith("_gate")), "images are heard"


@pytest.mark.parametrize("family", FAMILIES)
def test_made_up_tokenizers(tmp_path: Path, family: str) -> None:
    """Settings are read from them as from published ones, texts come back, and the special ids are those of config.json."""
    folder = FAMILIES[family](tmp_path / "config")
    config = read_config(folder)
    assert write_tokenizer(config, folder)
    path = tokenizer_file(folder, config)
    tokenizer, _ = read_tokenizer(path, config, read_json(folder / "tokenizer_config.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False)
        assert max(ids) < config.text.vocab_size
        assert tokenizer.decode(ids).strip() == text
    assert tokenizer.config.image_token_id == config.image_token_id
    assert tokenizer.config.add_bos == (family != "qwen_vl")
    assert tokenizer.config.bos_token_id == {"mllama": 128000, "qwen_vl": 151643, "llava_next": 1}[family]
    if family == "mllama":
        template = read_json(folder / "tokenizer_config.json")["chat_template"]
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        prompt = jinja2.Template(template).render(messages=[message], bos_token="<b>", add_generation_prompt=True)
        assert prompt == (
            "<b><|start_header_id|>user<|end_header_id|>\n\n<|image|>What?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert write_tokenizer(config, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before, "what is there stays"


def test_a_vocabulary_without_room_for_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(mllama_model(), tmp_path / "config")
    assert main([str(tmp_path / "config"), "--out", str(tmp_path / "out")]) == 2
    assert "config.json leaves -168 tokens before its special ones, and a tokenizer needs 256" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_known_model_with_other_sizes(tmp_path: Path) -> None:
    sizes = {"text_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}}
    options = [f"--set=text_config.{name}={value}" for name, value in sizes["text_config"].items()]
    options += [
        "--set=text_config.intermediate_size=8",
        "--set=vision_config.num_hidden_layers=2",
        "--set=torch_dtype=bfloat16",
    ]
    assert main(["llava-v1.6-vicuna-13b-hf", "--out", str(tmp_path / "out"), *options]) == 0
    config, source = read_config(tmp_path / "out"), open_source(tmp_path / "out")
    assert (config.family, config.text.hidden_size, config.text.layers, config.vision.layers) == ("llava_next", 8, 1, 2)
    assert {t.dtype for t in source.tensors.values()} == {"bfloat16"}
    assert match(config, source.tensors).recipes["text.embed.weight"].tensors[1].name == "image_newline"


def test_an_original_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_llava(tmp_path / "tiny", layout="original")
    settings = json.loads((tiny.folder / "config.json").read_text())
    shutil.copytree(tiny.folder / "clip", tmp_path / "config" / "clip")
    (tmp_path / "config" / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": "clip"}))
    assert main([str(tmp_path / "config"), "--out", str(tmp_path / "out")]) == 0
    assert "has no tokenizer.json or tokenizer.model, which compiling needs" in capsys.readouterr().out


def test_errors(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path} holds no config.json" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["nothing-here", "--out", str(tmp_path / "out")]) == 2
    assert "nothing-here is not a folder; expected one with config.json, or llava-1.5-7b-hf" in capsys.readouterr().err
    assert main([str(tiny.folder), "--out", str(tmp_path / "out"), "--set", "model_type.x=1"]) == 2
    assert "--set model_type.x: model_type of config.json is not a section" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tiny.folder), "--out", str(tmp_path / "out"), "--set", "text_config"])
    with pytest.raises(SystemExit):
        main([str(tiny.folder), "--out", str(tmp_path / "out"), "--shard-gb", "0"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert main([str(tiny.folder), "--out", str(tmp_path / "out")]) == 2
    assert "but only 10 are free" in capsys.readouterr().err
