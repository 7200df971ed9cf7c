"""LoRA: a checkpoint read with an adapter is what peft merges, and an adapter that is more than that is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.model_defs.config import read_config
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.lora import AdaptedSource, adapter_files, open_adapter
from staticvl.weights.source import Source, open_source
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import targets

from .checkpoints import tiny_llava
from .tiny_families import GOLDEN_QWEN, llava_next_model, mllama_model, save, write_original_config

TEXT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAVA = r".*\.(\w+_proj|fc1|fc2|linear_1|linear_2)|lm_head"
EVERYTHING = {"llava": LLAVA, "llava_next": LLAVA, "mllama": r".*\.(\w+_proj|fc1|fc2|multi_modal_projector)|lm_head"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "llava": tiny_llava(tmp_path_factory.mktemp("llava")).model,
        "llava_next": llava_next_model(),
        "mllama": mllama_model(),
    }


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """Save an adapter with random factors as peft does; returns the merged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TEXT} | settings)
        )
        generator = torch.Generator().manual_seed(1)
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder)
        return adapted.merge_and_unload()


def parameters(folder: Path, source: Source, out: Path) -> dict[str, Tensor]:
    files = convert(source, read_config(folder), out, Conversion(prefix="k")).files
    return {name: tensor for file in files for name, tensor in load_file(out / file).items()}


def compare(model: Any, tmp_path: Path, change: Callable[[Path], None] | None = None, **settings: Any) -> int:
    """Convert with the adapter and convert what peft merged; returns how many parameters the adapter changed."""
    merged = save(adapt(model, tmp_path / "adapter", **settings), tmp_path / "merged")
    base = save(model, tmp_path / "base")
    if change:
        change(tmp_path / "adapter")
    source = open_adapter(tmp_path / "adapter", read_config(base), open_source(base))
    got = parameters(base, source, tmp_path / "a")
    plain = parameters(base, open_source(base), tmp_path / "b")
    expected = parameters(base, open_source(merged), tmp_path / "c")
    assert got.keys() == expected.keys() == plain.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    return sum(not torch.equal(expected[name], plain[name]) for name in plain)


# --- Equal to peft ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layers"), [("llava", 2), ("llava_next", 2), ("mllama", 4)])
def test_text(tmp_path: Path, models: dict[str, Any], family: str, layers: int) -> None:
    # q, k and v of the towers are called the same, and o of Llama-3.2-Vision's too; its up and down are not.
    towers = {"llava": 2 * 3, "llava_next": 2 * 3, "mllama": 5 * 4}[family]
    assert compare(models[family], tmp_path) == 7 * layers + towers


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_every_linear_layer(tmp_path: Path, models: dict[str, Any], family: str) -> None:
    """With scales and ranks of their own for some, and rank-stabilised."""
    settings: dict[str, Any] = {
        "use_rslora": True,
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "self_attn.q_proj": 4},
        "alpha_pattern": {".*language_model.*down_proj": 7, "lm_head": 1},
    }
    config = read_config(save(models[family], tmp_path / "config"))
    linear = [n for n, s in targets(config).items() if len(s) == 2 and not any(w in n for w in ("embed", "positions", "tile"))]
    assert compare(models[family], tmp_path, target_modules=EVERYTHING[family], **settings) == len(linear)


def test_the_copy_of_lm_head_that_peft_saves(tmp_path: Path, models: dict[str, Any]) -> None:
    """It is what the adapter was trained on, so it goes before the checkpoint's own."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        assert "base_model.model.lm_head.base_layer.weight" in tensors
        weights = load_file(tmp_path / "base" / "model.safetensors")
        weights["language_model.lm_head.weight"] += 1
        save_file(weights, tmp_path / "base" / "model.safetensors")

    assert compare(models["llava"], tmp_path, change, target_modules=["lm_head"]) == 1


def test_cross_layers_alone(tmp_path: Path, models: dict[str, Any]) -> None:
    assert compare(models["mllama"], tmp_path, target_modules=r".*cross_attn\.(q|k)_proj") == 4


def test_an_unused_setting(tmp_path: Path, models: dict[str, Any]) -> None:
    """peft passes over fan_in_fan_out for the layers that these models have."""

    def turn_on(folder: Path) -> None:
        rewrite(folder, fan_in_fan_out=True)

    compare(models["llava"], tmp_path, turn_on)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "on the hub": lambda name: (
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.lm_head", "model.language_model.lm_head")
        .replace("model.model.vision_tower.", "model.vision_tower.vision_model.")
        .replace("model.model.vision_model.", "model.vision_model.")
        .replace("model.model.multi_modal_projector", "model.multi_modal_projector")
    ),
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_spellings_of_modules(tmp_path: Path, models: dict[str, Any], family: str, spelling: str) -> None:
    def respell(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        spelled = {SPELLINGS[spelling](name): tensor for name, tensor in tensors.items()}
        assert not spelled.keys() & tensors.keys()
        torch.save(spelled, folder / "adapter_model.bin")
        file.unlink()

    assert compare(models[family], tmp_path, respell, target_modules=EVERYTHING[family]) > 20


def test_original_layout(tmp_path: Path, models: dict[str, Any]) -> None:
    """The decoder's modules are spelled without a prefix there."""
    model = models["llava_next"]
    tower = write_original_config(tmp_path / "base", model)
    weights = {}
    for name, value in model.state_dict().items():
        for theirs, original in (
            ("model.language_model.", "model."),
            ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ):
            if name.startswith(theirs):
                weights[original + name.removeprefix(theirs)] = value.contiguous()
        if name in ("lm_head.weight", "model.image_newline"):
            weights[name] = value.contiguous()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "adapter", {"model.layers.1.self_attn.k_proj": (32, 64), "model.mm_projector.2": (64, 64)})
    config = read_config(tmp_path / "base", vision_tower=tower)
    source = open_adapter(tmp_path / "adapter", config, open_source(tmp_path / "base"))
    assert source.adapted == ("model.layers.1.self_attn.k_proj.weight", "model.mm_projector.2.weight")


def test_qwen(tmp_path: Path) -> None:
    """Against a merge by hand, also where one tensor becomes three of ours."""
    modules = {
        "transformer.h.1.attn.c_attn": (768, 256),
        "transformer.h.0.mlp.w2": (128, 256),
        "transformer.visual.transformer.resblocks.1.attn.in_proj": (312, 104),
        "transformer.visual.attn_pool.kv_proj": (256, 104),
    }
    factors = write_adapter(tmp_path / "adapter", modules, r=4, lora_alpha=6)
    weights = load_file(GOLDEN_QWEN / "model.safetensors")
    for module in modules:
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + 6 / 4 * b @ a
    (tmp_path / "merged").mkdir()
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    config = read_config(GOLDEN_QWEN)
    source = open_adapter(tmp_path / "adapter", config, open_source(GOLDEN_QWEN))
    assert isinstance(source, AdaptedSource) and {f"{module}.weight" for module in modules} == set(source.adapted)
    got = parameters(GOLDEN_QWEN, source, tmp_path / "a")
    expected = parameters(GOLDEN_QWEN, open_source(tmp_path / "merged"), tmp_path / "b")
    plain = parameters(GOLDEN_QWEN, open_source(GOLDEN_QWEN), tmp_path / "c")
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
    changed = {name for name in plain if not torch.equal(plain[name], got[name])}
    assert changed == {f"text.layers.1.attn.{n}.weight" for n in "qkv"} | {
        "text.layers.0.mlp.gate.weight", "pool.kv.weight", *(f"vision.layers.1.attn.{n}.weight" for n in "qkv"),
    }  # fmt: skip


def test_half_precision_is_merged_in_float32(tmp_path: Path) -> None:
    base = tiny_llava(tmp_path / "base", dtype=torch.float16).folder
    module = "model.language_model.layers.0.mlp.up_proj"
    factors = write_adapter(tmp_path / "adapter", {module: (112, 64)}, dtype=torch.bfloat16)
    source = open_adapter(tmp_path / "adapter", read_config(base), open_source(base))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    expected = open_source(base).read(name).double() + b @ a
    assert source.read(name).dtype == torch.float32
    assert (source.read(name) - expected).abs().max() < 1e-6
    assert torch.equal(source.read(name, (10, 30)), source.read(name)[10:30])


def test_files(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"lm_head": (389, 64)})
    assert [path.name for path in adapter_files(tmp_path)] == ["adapter_config.json", "adapter_model.safetensors"]


# --- Errors ----------------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path, modules: dict[str, tuple[int, int]], *, r: int = 3, lora_alpha: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """An adapter of linear layers [out, in] with random factors; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for module, (out, columns) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, columns, generator=generator).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, r, generator=generator).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha, "target_modules": list(modules), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


def rewrite(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("base")).folder


def refuse(folder: Path, base: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        open_adapter(folder, read_config(base), open_source(base))


UP = {"model.language_model.layers.0.mlp.up_proj": (112, 64)}
KEY = "base_model.model.model.language_model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"peft_type": "LOHA"},
            "peft_type is 'LOHA'; only 'LORA' is supported: merge the adapter into the checkpoint with peft",
        ),
        ({"use_dora": True}, "use_dora is True, which is not supported; merge the adapter"),
        ({"modules_to_save": ["wte", "lm_head"]}, r"modules_to_save is \['wte', 'lm_head'\], which is not supported; merge"),
        ({"bias": "lora_only"}, "bias is 'lora_only'; only 'none' is supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow is 1, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the model's own weights"),
        ({"rank_pattern": ["x"]}, r"rank_pattern is \['x'\]; expected an object"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern has '\(', which is not a regular expression"),
        (
            {"alpha_pattern": {"up_proj": "x"}},
            "lora_alpha of model.language_model.layers.0.mlp.up_proj is 'x'; expected a number",
        ),
        ({"r": 0}, "the rank of model.language_model.layers.0.mlp.up_proj is 0; expected a positive integer"),
        ({"r": 4}, r"lora_A.weight is \[3, 64\], expected \[4, 64\] for rank 4 and a weight of \[112, 64\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(tmp_path: Path, base: Path, settings: dict[str, Any], message: str) -> None:
    write_adapter(tmp_path, UP)
    rewrite(tmp_path, **settings)
    refuse(tmp_path, base, message)


def test_settings_of_tomorrow_that_are_off(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path, UP)
    rewrite(tmp_path, a_setting_of_tomorrow=None, another=False, modules_to_save=[], use_dora=False)
    open_adapter(tmp_path, read_config(base), open_source(base))


def other_rank(tensors: dict[str, Tensor]) -> None:
    tensors[f"{KEY}.lora_B.weight"] = torch.zeros(112, 2)


def add(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def both(module: str, out: int, columns: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update(
        {
            f"base_model.model.{module}.lora_{side}.weight": torch.zeros(shape)
            for side, shape in (("A", (3, columns)), ("B", (out, 3)))
        }
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{KEY}.lora_B.weight"),
            "lacks lora_B of model.language_model.layers.0.mlp.up_proj; fetch the adapter again",
        ),
        (other_rank, r"lora_B.weight is \[112, 2\], expected \[112, 3\]"),
        (add(f"{KEY}.lora_A.weight", 3, 64, dtype=torch.int8), "lora_A.weight is int8; expected float32"),
        (
            both("model.language_model.layers.7.mlp.up_proj", 112, 64),
            "adapts model.language_model.layers.7.mlp.up_proj, which this",
        ),
        (
            both("mlp.up_proj", 112, 64),
            "adapts mlp.up_proj, which this model does not have; expected an adapter that was trained",
        ),
        (both("model.layers.0.mlp.up_proj", 112, 64), "adapts model.layers.0.mlp.up_proj twice, under another spelling too"),
        (
            both("model.vision_tower.pre_layrnorm", 32, 32),
            "adapts model.vision_tower.pre_layrnorm, which is not a linear layer",
        ),
        (add(f"{KEY}.lora_A.default.weight", 3, 64), "which mean the same; keep one of them"),
        (add("base_model.model.model.embed.lora_embedding_A", 3, 8), "adapts an embedding, which is not supported; merge"),
        (
            add(f"{KEY}.lora_magnitude_vector.weight", 112),
            "lora_magnitude_vector.weight is not one of a linear layer's low-rank",
        ),
        (add("base_model.model.lm_head.weight", 389, 64), "lm_head.weight is not one of a linear layer's low-rank factors"),
        (add("model.layers.0.mlp.up_proj.lora_A.weight", 3, 64), "is not one of a linear layer's low-rank factors"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, base: Path, change: Any, message: str) -> None:
    tensors = write_adapter(tmp_path, UP)
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refuse(tmp_path, base, message)


def test_a_module_that_the_checkpoint_lacks(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path, UP)
    source = open_source(base)
    del source.tensors["language_model.model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(
        WeightsError, match=r"up_proj, which is not in the checkpoint; expected an adapter that was trained on a l"
    ):
        open_adapter(tmp_path, read_config(base), source)


def test_values_that_are_not_finite(tmp_path: Path, base: Path) -> None:
    tensors = write_adapter(tmp_path, UP)
    tensors[f"{KEY}.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    source = open_adapter(tmp_path, read_config(base), open_source(base))
    with pytest.raises(
        WeightsError, match=rf"adapter_model\.safetensors: tensor {KEY}\.lora_A\.weight holds values that are not"
    ):
        parameters(base, source, tmp_path / "out")


def test_folders_that_are_refused(tmp_path: Path, base: Path) -> None:
    refuse(tmp_path, base, "holds no adapter_config.json; expected the folder of a LoRA adapter as peft saves it")
    (tmp_path / "adapter_config.json").write_text("{}")
    refuse(tmp_path, base, "holds neither adapter_model.safetensors nor adapter_model.bin; fetch the adapter's weights")
    write_adapter(tmp_path, UP)
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ("{}", "peft_type is None"),
    ):
        (tmp_path / "adapter_config.json").write_text(content)
        refuse(tmp_path, base, message)
    write_adapter(tmp_path, UP)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refuse(tmp_path, base, "is a git-lfs pointer")
    write_adapter(tmp_path, UP)
    shutil.copyfile(tmp_path / "adapter_model.safetensors", tmp_path / "non_lora_trainables.bin")
    refuse(tmp_path, base, "non_lora_trainables.bin holds trained weights beside the adapter, which are not merged here; merge")
