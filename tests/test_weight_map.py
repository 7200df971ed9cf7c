"""Name tables: every published name is used or left out on purpose, and nothing goes where it does not belong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from staticvl.model_defs.config import ModelConfig, read_config
from staticvl.weights.source import open_source
from staticvl.weights.tensors import SourceTensor, WeightsError
from staticvl.weights.weight_map import WeightMap, match, source_names, targets

from .checkpoints import tiny_llava


def tensors_of(config: ModelConfig) -> dict[str, SourceTensor]:
    return {name: tensor(name, shape) for name, shape in source_names(config).items()}


def tensor(name: str, shape: tuple[int, ...], dtype: str = "float16") -> SourceTensor:
    return SourceTensor(name, dtype, shape, Path("model.safetensors"), 0, ())


def read_from(plan: WeightMap) -> dict[str, list[str]]:
    """Our parameter -> the checkpoint's tensors that it is made from."""
    return {ours: [tensor.name for tensor in recipe.tensors] for ours, recipe in plan.recipes.items()}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(tiny_llava(tmp_path_factory.mktemp("hf")).folder)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    tiny = tiny_llava(tmp_path_factory.mktemp("original"), layout="original")
    return read_config(tiny.folder, vision_tower=tiny.vision_tower)


# --- Spellings -----------------------------------------------------------------------------------------------------------


def _in_memory(name: str) -> str:
    name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "language_model.")
    return name if name.startswith("lm_head") else f"model.{name}"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "hub": lambda name: name,
    "hub, tower without vision_model": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "in memory, old tower": _in_memory,
    "in memory": lambda name: _in_memory(name).replace("vision_tower.vision_model.", "vision_tower."),
    "original with its tower": lambda name: (
        name.replace("language_model.model.", "model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("multi_modal_projector.linear_", "model.mm_projector.")
        .replace("mm_projector.1.", "mm_projector.0.")
        .replace("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model.")
    ),
    "tower apart": lambda name: name.replace("vision_tower.vision_model.", "tower/vision_model."),
    "tower apart, without vision_model": lambda name: name.replace("vision_tower.vision_model.", "tower/"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_plan(hf: ModelConfig, spelling: str) -> None:
    spell = SPELLINGS[spelling]
    reference = match(hf, tensors_of(hf))
    plan = match(hf, {spell(name): tensor(spell(name), t.shape) for name, t in tensors_of(hf).items()})
    assert list(plan.recipes) == list(targets(hf))
    assert read_from(plan) == {ours: [spell(name) for name in names] for ours, names in read_from(reference).items()}
    assert sorted(plan.ignored) == sorted(map(spell, reference.ignored))


@pytest.mark.parametrize("names", ["old", "new", "saved"])
def test_what_transformers_writes(tmp_path: Path, hf: ModelConfig, names: str) -> None:
    folder = tiny_llava(tmp_path, names=names, sharded=True).folder  # type: ignore[arg-type]
    assert match(hf, open_source(folder).tensors).recipes.keys() == targets(hf).keys()


def test_names_are_not_crossed(hf: ModelConfig) -> None:
    plan = {ours: name for ours, (name,) in read_from(match(hf, tensors_of(hf))).items()}
    text, vision = "language_model.model.layers.1.", "vision_tower.vision_model.encoder.layers.1."
    expected = {f"text.layers.1.attn.{n}.weight": f"{text}self_attn.{n}_proj.weight" for n in "qkvo"}
    expected |= {f"text.layers.1.mlp.{n}.weight": f"{text}mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    expected |= {f"vision.layers.1.attn.{n}.bias": f"{vision}self_attn.{n}_proj.bias" for n in "qkv"}
    expected |= {
        "text.layers.1.attn_norm.weight": f"{text}input_layernorm.weight",
        "text.layers.1.mlp_norm.weight": f"{text}post_attention_layernorm.weight",
        "vision.layers.1.attn.o.weight": f"{vision}self_attn.out_proj.weight",
        "vision.layers.1.attn_norm.bias": f"{vision}layer_norm1.bias",
        "vision.layers.1.mlp_norm.weight": f"{vision}layer_norm2.weight",
        "vision.layers.1.mlp.up.weight": f"{vision}mlp.fc1.weight",
        "vision.layers.1.mlp.down.bias": f"{vision}mlp.fc2.bias",
        "projector.up.weight": "multi_modal_projector.linear_1.weight",
        "projector.down.bias": "multi_modal_projector.linear_2.bias",
    }
    assert {ours: plan[ours] for ours in expected} == expected


def test_only_the_layers_that_run_are_taken(hf: ModelConfig) -> None:
    assert (hf.vision.layers, hf.vision.used_layers) == (3, 2)
    assert {name.split(".")[2] for name in targets(hf) if name.startswith("vision.layers.")} == {"0", "1"}
    deeper = replace(hf, vision=replace(hf.vision, used_layers=3))
    assert {name.split(".")[2] for name in targets(deeper) if name.startswith("vision.layers.")} == {"0", "1", "2"}
    assert match(deeper, tensors_of(hf)).ignored == tuple(
        f"vision_tower.vision_model.post_layernorm.{n}" for n in ("weight", "bias")
    )


def test_a_projector_without_biases(hf: ModelConfig) -> None:
    bare = replace(hf, projector_bias=False)
    assert {name for name in targets(bare) if name.startswith("projector.")} == {"projector.up.weight", "projector.down.weight"}
    assert match(bare, tensors_of(bare)).recipes.keys() == targets(bare).keys()
    with pytest.raises(WeightsError, match=r"unknown tensors: multi_modal_projector\.linear_1\.bias"):
        match(bare, tensors_of(hf))


# --- Errors --------------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named(hf: ModelConfig) -> None:
    tensors = tensors_of(hf)
    del tensors["language_model.lm_head.weight"]
    with pytest.raises(WeightsError, match=r"lacks language_model\.lm_head\.weight \(1 tensor\); fetch all"):
        match(hf, tensors)
    few = {name: t for name, t in tensors.items() if "layers.0." not in name}
    with pytest.raises(WeightsError, match=r"lacks (\S+ ){4}\S+ and 21 more \(26 tensors\)"):
        match(hf, few)


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "language_model.model.layers.2.mlp.up_proj.weight",  # a layer too many
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "image_newline",
        "base_model.model.lm_head.weight",
    ],
)
def test_unknown_tensors_are_named(hf: ModelConfig, name: str) -> None:
    with pytest.raises(WeightsError, match=rf"unknown tensors: {name} \(1 tensor\); check that config\.json"):
        match(hf, tensors_of(hf) | {name: tensor(name, (1,))})


@pytest.mark.parametrize("prefix", ["student.", "vlm.backbone.", "ema."])
def test_a_foreign_prefix_is_named(hf: ModelConfig, prefix: str) -> None:
    """On all tensors, and on some of them."""
    tensors = {prefix + name: tensor(prefix + name, t.shape) for name, t in tensors_of(hf).items()}
    message = (
        rf"unknown tensors: {prefix}\S+ .* \({len(tensors)} tensors\); {len(tensors)} of them are known without the prefix"
    )
    with pytest.raises(WeightsError, match=rf"{message} '{prefix}': save the weights without it"):
        match(hf, tensors)
    name = "language_model.lm_head.weight"
    some = tensors_of(hf)
    some[prefix + name] = some.pop(name)
    with pytest.raises(WeightsError, match=rf"unknown tensors: {prefix}{name} \(1 tensor\); 1 of them are known without"):
        match(hf, some)


def test_an_adapter_beside_the_weights(hf: ModelConfig) -> None:
    """As peft keeps them in one module until they are merged."""
    name = "language_model.model.layers.0.self_attn.q_proj"
    tensors = tensors_of(hf)
    shape = tensors.pop(f"{name}.weight").shape
    unmerged = {f"{name}.base_layer.weight": shape, f"{name}.lora_A.default.weight": (2, shape[1])}
    with pytest.raises(WeightsError, match=r"holds an adapter beside its weights: .*base_layer.*; merge it first"):
        match(hf, tensors | {name: tensor(name, size) for name, size in unmerged.items()})


def test_the_same_tensor_twice(hf: ModelConfig) -> None:
    extra = tensor("model.norm.weight", (hf.text.hidden_size,))
    with pytest.raises(WeightsError, match=r"there twice: language_model\.model\.norm\.weight and model\.norm\.weight \(1"):
        match(hf, tensors_of(hf) | {extra.name: extra})


def test_wrong_shapes_are_named(hf: ModelConfig) -> None:
    tensors = tensors_of(hf)
    name = "language_model.model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensor(name, (64, 64))
    with pytest.raises(WeightsError, match=rf"{name} is \[64, 64\], expected \[32, 64\] \(1 tensor\)"):
        match(hf, tensors)


def test_dtypes_matter_only_where_used(hf: ModelConfig) -> None:
    buffer = tensor("vision_tower.vision_model.embeddings.position_ids", (1, 17), "int64")
    assert buffer.name in match(hf, tensors_of(hf) | {buffer.name: buffer}).ignored
    name = "language_model.model.norm.weight"
    with pytest.raises(WeightsError, match=rf"{name} is int8 \(1 tensor\); expected float32, float16 or bfloat16"):
        match(hf, tensors_of(hf) | {name: tensor(name, (64,), "int8")})


def test_original_without_a_tower(original: ModelConfig) -> None:
    inside = {name: t for name, t in tensors_of(original).items() if not name.startswith("tower/")}
    with pytest.raises(
        WeightsError, match="holds no vision tower; fetch tiny/clip and give its folder with --vision-tower PATH"
    ):
        match(original, inside)
    wrong = tensor("tower/model.embed.weight", (1,))
    with pytest.raises(WeightsError, match="folder lacks the tensors vision_model"):
        match(original, inside | {wrong.name: wrong})


def test_original_with_a_tower_of_its_own(original: ModelConfig) -> None:
    tensors = tensors_of(original)
    own = {
        name.replace("tower/", "model.vision_tower.vision_tower."): t
        for name, t in tensors.items()
        if name.startswith("tower/")
    }
    own = {name: tensor(name, t.shape) for name, t in own.items()}
    plan = match(original, tensors | own)
    assert read_from(plan)["vision.class_embedding"][0].startswith("model.vision_tower.vision_tower.")
    assert {name for name in tensors if name.startswith("tower/")} <= set(plan.ignored)


def test_the_rest_of_a_clip_checkpoint_is_left_out(tmp_path: Path, original: ModelConfig) -> None:
    tiny = tiny_llava(tmp_path, layout="original", fmt="bin", sharded=True)
    plan = match(original, open_source(tiny.folder, tiny.vision_tower).tensors)
    left = {name for name in plan.ignored if "vision_model.encoder" not in name}
    assert left == {
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "tower/logit_scale",
        "tower/text_model.embeddings.position_ids",
        "tower/text_model.embeddings.token_embedding.weight",
        "tower/text_model.final_layer_norm.weight",
        "tower/text_projection.weight",
        "tower/visual_projection.weight",
        "tower/vision_model.embeddings.position_ids",
        "tower/vision_model.post_layernorm.bias",
        "tower/vision_model.post_layernorm.weight",
    }
