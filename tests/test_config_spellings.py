"""Settings that a config.json has in two spellings: what counts is what transformers 5 computes with, and it is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, LlavaForConditionalGeneration

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Options
from staticvl.model_defs.config import ConfigError, ModelConfig, TiledConfig, read_config
from staticvl.runtime.artifact import read_manifest
from staticvl.tools.cli import main

from .checkpoints import tiny_llava
from .conftest import SMALL_BUCKETS
from .parity import Case, check, generated, ours
from .test_config import CONFIGS

SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 400.0}
ROPES: dict[str, dict[str, Any]] = {
    "theta outside": {"rope_theta": 300.0},
    "theta inside": {"rope_parameters": PLAIN},
    "theta twice": {"rope_theta": 300.0, "rope_parameters": PLAIN},
    "theta outside of rope_parameters": {"rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}},
    "theta in rope_scaling": {"rope_theta": 300.0, "rope_scaling": {**SCALING, "rope_theta": 500.0}},
    "both sections": {"rope_scaling": SCALING, "rope_parameters": PLAIN},
    "both sections and theta": {"rope_theta": 300.0, "rope_scaling": SCALING, "rope_parameters": PLAIN},
    "scaling says none": {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {**SCALING, "rope_theta": 500.0}},
    "scaling is empty": {"rope_scaling": {}, "rope_parameters": {**SCALING, "rope_theta": 500.0}},
    "type and rope_type": {"rope_scaling": {**SCALING, "type": "default"}},
    "type alone": {"rope_scaling": {"type": "default"}},
    "trained on as many as there are": {
        "rope_scaling": {key: value for key, value in SCALING.items() if key != "original_max_position_embeddings"}
    },
}
AGREEING = {
    "theta outside", "theta inside", "theta outside of rope_parameters", "scaling is empty", "type alone",
    "trained on as many as there are",
}  # fmt: skip


def written(family: str, folder: Path, text: Mapping[str, Any], top: Mapping[str, Any] | None = None) -> Path:
    """A published form's config.json without the rope settings of its own, with others in its place."""
    data = json.loads((CONFIGS[family] / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        data["text_config"].pop(name, None)
    data["text_config"].update(text)
    data.update(top or {})
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def read(folder: Path) -> tuple[ModelConfig, list[str]]:
    notes: list[str] = []
    return read_config(folder, notes=notes), notes


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
@pytest.mark.parametrize("case", ROPES)
def test_rope(tmp_path: Path, family: str, case: str) -> None:
    config, notes = read(written(family, tmp_path, ROPES[case]))
    theirs = AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert config.text.rope.theta == theirs["rope_theta"]
    scaling = config.text.rope.llama3
    assert (scaling is not None) == (theirs["rope_type"] == "llama3")
    if scaling:
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_positions) == tuple(
            theirs[name] for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
    assert bool(notes) == (case not in AGREEING), notes
    assert all("counts" in note and "text_config" in note for note in notes)


def test_scaling_that_says_too_little(tmp_path: Path) -> None:
    """transformers refuses it too."""
    with pytest.raises(ConfigError, match="factor is None; expected a positive number"):
        read(written("mllama", tmp_path, {"rope_scaling": {"rope_type": "llama3"}}))
    with pytest.raises(KeyError):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_ids_at_both_levels(tmp_path: Path, family: str) -> None:
    """image_token_id before image_token_index; ids beside text_config before those in it."""
    top = {"image_token_id": 70, "image_token_index": 71, "bos_token_id": 6, "eos_token_id": 7}
    config, notes = read(written(family, tmp_path, {"bos_token_id": 8, "eos_token_id": [9]}, top))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ends = GenerationConfig.from_model_config(theirs)
    assert config.image_token_id == theirs.image_token_id == theirs.image_token_index
    assert (config.bos_token_id, config.eos_token_ids) == (ends.bos_token_id, (ends.eos_token_id,))
    assert len(notes) == 3
    written(family, tmp_path, {"bos_token_id": 8, "eos_token_id": [9]}, {"image_token_id": 70, "image_token_index": 70})
    assert read(tmp_path)[1] == []


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_sizes_beside_text_config(tmp_path: Path, family: str) -> None:
    """transformers takes those of text_config, or their defaults."""
    top = {"hidden_size": 8, "vocab_size": 11, "rope_theta": 7.0, "num_hidden_layers": None}
    config, notes = read(written(family, tmp_path, {}, top))
    theirs = AutoConfig.from_pretrained(tmp_path).text_config
    assert (config.text.hidden_size, config.text.vocab_size) == (theirs.hidden_size, theirs.vocab_size)
    assert config.text.rope.theta == theirs.rope_parameters["rope_theta"]
    assert len(notes) == 3
    assert f"hidden_size is 8, but in text_config it is {theirs.hidden_size}, which counts" in notes[0]
    assert "rope_theta is 7.0, but in text_config it is not there, and its default counts" in notes[1]
    same = {"hidden_size": theirs.hidden_size, "vocab_size": theirs.vocab_size}
    assert read(written(family, tmp_path, {}, same))[1] == []


def test_two_quantisations(tmp_path: Path) -> None:
    top = {"quantization_config": {"quant_method": "gptq"}, "compression_config": {"quant_method": "awq"}}
    notes = read(written("llava", tmp_path, {}, top))[1]
    assert len(notes) == 1 and "the first counts" in notes[0] and "gptq" in notes[0]


def test_heads_of_a_tower(tmp_path: Path) -> None:
    data = json.loads((CONFIGS["mllama"] / "config.json").read_text())
    data["vision_config"] |= {"attention_heads": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(data))
    config, notes = read(tmp_path)
    assert isinstance(config.vision, TiledConfig)
    assert config.vision.heads == AutoConfig.from_pretrained(tmp_path).vision_config.attention_heads == 4
    assert "num_attention_heads is 4 but attention_heads is 2; the first counts" in notes[0]


def test_logits_and_what_the_user_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A compiled model whose config has theta twice, against transformers reading the same folder."""
    tiny = tiny_llava(tmp_path / "checkpoint")
    config = json.loads((tiny.folder / "config.json").read_text())
    config["text_config"] |= {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    (tiny.folder / "config.json").write_text(json.dumps(config))
    model: Any = LlavaForConditionalGeneration.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    build(Options(checkpoint=tiny.folder, out=tmp_path / "a", buckets=SMALL_BUCKETS))
    with runtime.load(tmp_path / "a", threads=1) as compiled:
        out = ours(compiled, Case("How many shapes are there in the second picture?", []), 16)
        ids = compiled.processor.raw_prompt("How many shapes are there in the second picture?").token_ids
    inputs = torch.from_numpy(ids.astype("int64"))[None]
    check(out, generated(model, {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}, 16), "theta twice")
    note = "config.json, text_config: rope_theta is 1000000.0, but 50.0 in rope_parameters, which counts, as in transformers 5"
    assert read_manifest(tmp_path / "a").build.notes == (note,)
    for command in (["compile", tiny.folder, "--out", tmp_path / "a"], ["show", tmp_path / "a"]):
        capsys.readouterr()
        assert main([str(word) for word in command]) == 0
        assert note in " ".join(capsys.readouterr().out.split())
    assert main(["compile", str(tiny.folder), "--out", str(tmp_path / "b"), "--plan-only"]) == 0
    assert "rope_theta is 1000000.0, but 50.0" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "a")
