"""Conversion of LLaVA-1.6, Llama-3.2-Vision and Qwen-VL: what is converted computes what the models' own code computes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from staticvl.model_defs.config import ModelConfig, ResampledConfig, TiledConfig, read_config
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.quantize import dequantize_w8
from staticvl.weights.source import open_source
from staticvl.weights.storage import stored_targets
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import match, source_names, targets

from .checkpoints import write_weights
from .test_convert import expected_weights
from .tiny_families import GOLDEN_QWEN, llava_next_model, mllama_model, save, write_original_config


def converted(folder: Path, out: Path, *, quant: str = "none", tower: Path | None = None) -> dict[str, Tensor]:
    """Every stored tensor; their names, order apart, are those of the plan."""
    config = read_config(folder, vision_tower=tower)
    files = convert(open_source(folder, tower), config, out, Conversion(quant=quant, prefix="k", shard_bytes=200_000)).files
    stored = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in stored.items()} == {
        n: (s.dtype, s.shape) for n, s in stored_targets(config, quant).items()
    }
    return stored


def respelled(model: Any, folder: Path, spell: Callable[[str], str], config: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {spell(k): v for k, v in model.state_dict().items()}, fmt="safetensors", sharded=False)
    if config.parent != folder:
        shutil.copyfile(config, folder / "config.json")
    return folder


def old(name: str) -> str:
    """transformers' name in memory -> on the hub."""
    for theirs, hub in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(theirs):
            return hub + name.removeprefix(theirs)
    raise AssertionError(name)


def original(name: str) -> str:
    """transformers' name in memory -> in the original repository of LLaVA-1.6."""
    for theirs, hub in (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(theirs):
            return hub + name.removeprefix(theirs)
    return name


# --- LLaVA-1.6 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def next_model() -> Any:
    return llava_next_model()


@pytest.mark.parametrize("spelling", ["saved", "in memory", "hub", "original"])
def test_llava_next(tmp_path: Path, next_model: Any, spelling: str) -> None:
    folder, tower = save(next_model, tmp_path / "saved"), None
    if spelling in ("in memory", "hub"):
        folder = respelled(next_model, tmp_path / "x", old if spelling == "hub" else str, folder / "config.json")
    if spelling == "original":
        folder = tmp_path / "x"
        tower = write_original_config(folder, next_model)
        respelled(next_model, folder, original, folder / "config.json")
        shutil.copyfile(folder / "model.safetensors", tower / "model.safetensors")  # a tower that must not be used
    got, expected = converted(folder, tmp_path / "out", tower=tower), expected_weights(next_model)
    newline = next_model.model.image_newline.detach()
    expected["text.embed.weight"] = torch.cat([expected["text.embed.weight"], newline[None]])
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_llava_next_wants_its_own_tower(tmp_path: Path, next_model: Any) -> None:
    tower = write_original_config(tmp_path / "x", next_model)
    folder = respelled(next_model, tmp_path / "x", original, tmp_path / "x" / "config.json")
    config, tensors = read_config(folder, vision_tower=tower), open_source(folder).tensors
    stripped = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    for apart in ({}, {f"tower/{name.split('vision_tower.')[-1]}": t for name, t in tensors.items() if "vision_tower" in name}):
        with pytest.raises(WeightsError, match=r"lacks its vision tower.* no other fits: fetch all of its weight files"):
            match(config, stripped | apart)
    del tensors["model.image_newline"]
    with pytest.raises(WeightsError, match=r"lacks model\.image_newline \(1 tensor\)"):
        match(config, tensors)


# --- Llama-3.2-Vision ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled_model() -> Any:
    return mllama_model()


def expected_mllama(model: Any) -> dict[str, Tensor]:
    """Our names from transformers' own modules, written out without the tables under test; transformed ones are left out."""
    vision, text, modules = model.model.vision_model, model.model.language_model, {}
    gates: dict[str, Tensor] = {}
    modules |= {"text.embed": text.embed_tokens, "text.norm": text.norm, "text.lm_head": model.lm_head}
    cross = 0
    for i, layer in enumerate(text.layers):
        at, mlp = f"text.layers.{i}", layer.mlp
        modules |= {
            f"{at}.attn_norm": layer.input_layernorm, f"{at}.mlp_norm": layer.post_attention_layernorm,
            f"{at}.mlp.gate": mlp.gate_proj, f"{at}.mlp.up": mlp.up_proj, f"{at}.mlp.down": mlp.down_proj,
        }  # fmt: skip
        if i in model.config.text_config.cross_attention_layers:
            attention = layer.cross_attn
            modules |= {
                f"{at}.attn.q": attention.q_proj, f"{at}.attn.o": attention.o_proj, f"{at}.attn.q_norm": attention.q_norm,
                f"cross.{cross}.k": attention.k_proj, f"cross.{cross}.v": attention.v_proj,
                f"cross.{cross}.k_norm": attention.k_norm,
            }  # fmt: skip
            gates |= {f"{at}.attn_gate": layer.cross_attn_attn_gate, f"{at}.mlp_gate": layer.cross_attn_mlp_gate}
            cross += 1
        else:
            attention = layer.self_attn
            modules |= {f"{at}.attn.{n}": getattr(attention, f"{n}_proj") for n in "qkvo"}
    modules |= {
        "vision.patch": vision.patch_embedding, "vision.pre_norm": vision.layernorm_pre,
        "vision.post_norm": vision.layernorm_post,
    }  # fmt: skip
    for ours, layers in (("layers", vision.transformer.layers), ("global_layers", vision.global_transformer.layers)):
        for i, layer in enumerate(layers):
            at = f"vision.{ours}.{i}"
            modules |= {f"{at}.attn.{n}": getattr(layer.self_attn, f"{n}_proj") for n in "qkvo"}
            modules |= {
                f"{at}.attn_norm": layer.input_layernorm, f"{at}.mlp_norm": layer.post_attention_layernorm,
                f"{at}.mlp.up": layer.mlp.fc1, f"{at}.mlp.down": layer.mlp.fc2,
            }  # fmt: skip
            if ours == "global_layers":
                gates |= {f"{at}.attn_gate": layer.gate_attn, f"{at}.mlp_gate": layer.gate_ffn}
    expected = {f"{name}.weight": module.weight for name, module in modules.items()}
    expected |= {f"{n}.bias": m.bias for n, m in modules.items() if getattr(m, "bias", None) is not None}
    expected |= {"vision.class_embedding": vision.class_embedding, "projector.bias": model.model.multi_modal_projector.bias}
    expected |= {name: torch.tanh(gate) for name, gate in gates.items()}
    return {name: tensor.detach() for name, tensor in expected.items()}


MADE = {"vision.pre_tile.weight", "vision.positions.weight", "vision.post_tile.weight", "projector.weight"}


@pytest.mark.parametrize("spelling", ["saved", "in memory"])
def test_mllama(tmp_path: Path, tiled_model: Any, spelling: str) -> None:
    folder = save(tiled_model, tmp_path / "saved")
    if spelling == "in memory":
        folder = respelled(tiled_model, tmp_path / "x", str, folder / "config.json")
    got, expected = converted(folder, tmp_path / "out"), expected_mllama(tiled_model)
    assert got.keys() == expected.keys() | MADE
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    _check_made(got, tiled_model, read_config(folder))


@torch.no_grad()
def _check_made(got: dict[str, Tensor], model: Any, config: ModelConfig) -> None:
    """Each table row and the projector give what transformers' modules give; [tiles, rows, width]."""
    vision, sizes = model.model.vision_model, config.vision
    assert isinstance(sizes, TiledConfig)
    for id_ in range(len(sizes.ratios) + 1):
        ids = torch.tensor([[id_]])
        for name, module in (
            ("pre_tile", vision.pre_tile_positional_embedding), ("post_tile", vision.post_tile_positional_embedding),
        ):  # fmt: skip
            row = got[f"vision.{name}.weight"][id_].view(sizes.tiles, 1, -1)
            assert torch.equal(row, module(torch.zeros_like(row)[None], ids)[0])
        row = got["vision.positions.weight"][id_].view(sizes.tiles, sizes.rows_per_tile, -1)
        torch.testing.assert_close(
            row, vision.gated_positional_embedding(torch.zeros_like(row)[None], ids)[0], rtol=0, atol=1e-7
        )
    outputs = torch.randn(1 + len(sizes.taps), 5, sizes.hidden_size)
    stacked = torch.cat([outputs[0], torch.stack(list(outputs[1:]), dim=-1).flatten(1)], dim=-1)
    projected = linear(torch.cat(list(outputs), dim=-1), got["projector.weight"], got["projector.bias"])
    torch.testing.assert_close(projected, model.model.multi_modal_projector(stacked))


def test_quantised_mllama(tmp_path: Path, tiled_model: Any) -> None:
    """The decoder's linear layers are, cross layers' too; whatever a vision graph runs, gates and norms are not."""
    folder = save(tiled_model, tmp_path / "saved")
    got, whole = converted(folder, tmp_path / "w8", quant="w8a16"), converted(folder, tmp_path / "none")
    plain = {name for name in got if not name.endswith((".qweight", ".scales"))}
    cut = {f"text.layers.{i}.attn.{n}" for i in (0, 2) for n in "qkvo"} | {
        f"text.layers.{i}.attn.{n}" for i in (1, 3) for n in "qo"
    }
    cut |= {f"text.layers.{i}.mlp.{n}" for i in range(4) for n in ("gate", "up", "down")} | {"text.lm_head"}
    assert whole.keys() - plain == {f"{name}.weight" for name in cut}
    for name in cut:
        near = dequantize_w8(got[f"{name}.qweight"], got[f"{name}.scales"], whole[f"{name}.weight"].shape[1])
        assert (near - whole[f"{name}.weight"]).abs().max() < whole[f"{name}.weight"].abs().max() / 200


# --- Qwen-VL ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return converted(GOLDEN_QWEN, tmp_path_factory.mktemp("qwen"))


def golden(case: str) -> dict[str, Tensor]:
    return load_file(GOLDEN_QWEN.parent / "cases" / f"{case}.safetensors")


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def rms(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]


def project(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attention(w: dict[str, Tensor], name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[T, C] each, before their projections."""
    parts = (
        project(w, f"{name}.{n}", x).unflatten(-1, (heads, -1)).transpose(0, 1) for n, x in zip("qkv", (q, k, v), strict=True)
    )
    return project(w, f"{name}.o", scaled_dot_product_attention(*parts).transpose(0, 1).flatten(1))


def test_qwen_tower_computes_the_golden_features(qwen: dict[str, Tensor]) -> None:
    w, config = qwen, read_config(GOLDEN_QWEN).vision
    assert isinstance(config, ResampledConfig)
    case = golden("base_one_image")
    pixels = golden("image_preprocess")["img0.png"]
    x = torch.nn.functional.conv2d(pixels[None], w["vision.patch.weight"], stride=config.patch_size)[0].flatten(1).t()
    x = norm(w, "vision.pre_norm", x + w["vision.positions.weight"])
    torch.testing.assert_close(x, case["vision_ln_pre"][0], rtol=0, atol=1e-5)
    for i in range(config.layers):
        at = f"vision.layers.{i}"
        h = norm(w, f"{at}.attn_norm", x)
        x = x + attention(w, f"{at}.attn", h, h, h, config.heads)
        x = x + project(w, f"{at}.mlp.down", gelu(project(w, f"{at}.mlp.up", norm(w, f"{at}.mlp_norm", x))))
    torch.testing.assert_close(x, case["vision_blocks_out"][0], rtol=0, atol=2e-5)
    kv, query = norm(w, "pool.kv_norm", project(w, "pool.kv", x)), norm(w, "pool.query_norm", w["pool.query"])
    heads = config.output_size // config.resampler_head_dim
    x = attention(w, "pool.attn", query + w["pool.positions.weight"], kv + w["pool.key_positions.weight"], kv, heads)
    torch.testing.assert_close(x, case["vision_attn_pool_out"][0], rtol=0, atol=2e-5)
    x = project(w, "projector", norm(w, "pool.norm", x))
    torch.testing.assert_close(x, case["vision_features"][0], rtol=0, atol=2e-5)


def test_qwen_first_layer_computes_the_golden_hidden_state(qwen: dict[str, Tensor]) -> None:
    w, config = qwen, read_config(GOLDEN_QWEN).text
    case = golden("base_one_image")
    x = case["inputs_embeds_merged"][0]
    ids = case["input_ids"][0]
    assert torch.equal(w["text.embed.weight"][ids[:5]], x[:5]), "text comes before the image"
    angles = torch.arange(len(x))[:, None] * config.rope.theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))  # [T, D]
    h = rms(w, "text.layers.0.attn_norm", x)
    q, k, v = (project(w, f"text.layers.0.attn.{n}", h).unflatten(-1, (config.heads, -1)).transpose(0, 1) for n in "qkv")
    q, k = (
        t * cos + torch.cat([-t[..., config.head_dim // 2 :], t[..., : config.head_dim // 2]], dim=-1) * sin for t in (q, k)
    )
    attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
    x = x + project(w, "text.layers.0.attn.o", attended)
    h = rms(w, "text.layers.0.mlp_norm", x)
    gated = torch.nn.functional.silu(project(w, "text.layers.0.mlp.gate", h)) * project(w, "text.layers.0.mlp.up", h)
    x = x + project(w, "text.layers.0.mlp.down", gated)
    torch.testing.assert_close(x, case["hidden_after_layer_0"][0], rtol=0, atol=2e-5)
    logits = linear(rms(w, "text.norm", case["hidden_after_layer_1"][0]), w["text.lm_head.weight"])
    torch.testing.assert_close(logits, case["prefill_logits"][0], rtol=0, atol=5e-5)


def test_qwen_from_a_bin_file(tmp_path: Path, qwen: dict[str, Tensor]) -> None:
    """As published; the file of before 2020 is the one that is read whole and cut afterwards."""
    tensors = load_file(GOLDEN_QWEN / "model.safetensors")
    buffers = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "transformer.rotary_emb.inv_freq": torch.ones(32)}
    for zipped in (True, False):
        folder = tmp_path / str(zipped)
        folder.mkdir()
        shutil.copyfile(GOLDEN_QWEN / "config.json", folder / "config.json")
        torch.save(tensors | buffers, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        got = converted(folder, tmp_path / f"out-{zipped}")
        assert all(torch.equal(got[name], tensor) for name, tensor in qwen.items())


def test_qwen_without_a_projection_of_patches(tmp_path: Path) -> None:
    settings = json.loads((GOLDEN_QWEN / "config.json").read_text())
    visual = settings["visual"] | {"width": 256, "mlp_ratio": 1.0, "image_size": 224}  # 256 patches: nothing is resized
    (tmp_path / "config.json").write_text(json.dumps(settings | {"visual": visual}))
    config = read_config(tmp_path)
    names, ours = source_names(config), targets(config)
    assert "transformer.visual.attn_pool.kv_proj.weight" not in names and "pool.kv.weight" not in ours
    tensors = {name: torch.randn(shape) for name, shape in names.items()}
    write_weights(tmp_path, tensors, fmt="safetensors", sharded=True)
    got = converted(tmp_path, tmp_path / "out")
    assert torch.equal(got["vision.positions.weight"], tensors["transformer.visual.positional_embedding"])
    assert got["pool.key_positions.weight"].shape == (256, 256)
    assert math.prod(names["transformer.visual.proj"]) == got["projector.weight"].numel()
    assert torch.equal(got["projector.weight"].t(), tensors["transformer.visual.proj"])
