"""config.json of every family: an unknown key anywhere is refused by name, and a setting that is not implemented too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from staticvl.model_defs.config import ConfigError, read_config

from .checkpoints import tiny_llava
from .conftest import REPO

ASSETS = REPO / "tools" / "assets"
CONFIGS = {
    "llava": ASSETS / "tiny_llava15",
    "llava_next": ASSETS / "tiny_llava16",
    "mllama": ASSETS / "tiny_mllama",
    "qwen_vl": REPO / "tests" / "golden" / "qwen_vl_tiny" / "checkpoint",
}
SECTIONS = [
    *[(family, section) for family in ("llava", "llava_next", "mllama") for section in (None, "text_config", "vision_config")],
    ("qwen_vl", None),
    ("qwen_vl", "visual"),
]


def changed(family: str, folder: Path, section: str | None, **settings: object) -> Path:
    data = json.loads((CONFIGS[family] / "config.json").read_text())
    (data[section] if section else data).update(settings)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_the_family_is_told(family: str) -> None:
    assert read_config(CONFIGS[family]).family == family


@pytest.mark.parametrize(("family", "section"), SECTIONS)
def test_unknown_keys(tmp_path: Path, family: str, section: str | None) -> None:
    folder = changed(family, tmp_path, section, sliding_window=128)
    with pytest.raises(ConfigError, match=f"{section or 'config.json'}: unknown keys sliding_window"):
        read_config(folder)
    assert read_config(folder, ignore_keys=["sliding_window"]) == read_config(CONFIGS[family])


@pytest.mark.parametrize(
    ("family", "section", "settings", "message"),
    [
        ("llava", "text_config", {"attention_bias": True}, "attention_bias is True; supported: False"),
        ("llava_next", None, {"vision_feature_select_strategy": "full"}, "supported: 'default'"),
        ("llava_next", None, {"image_grid_pinpoints": [[50, 64]]}, "expected multiples of the vision tower's image_size"),
        ("llava_next", None, {"image_grid_pinpoints": "[[64"}, "expected a list of pairs of pixels"),
        ("llava_next", None, {"image_grid_pinpoints": []}, "expected at least one pair"),
        ("mllama", "text_config", {"cross_attention_layers": [99]}, "name layers that are not among"),
        ("mllama", "text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'; supported: 'default'"),
        ("mllama", "vision_config", {"vision_output_dim": 7}, "vision_output_dim is 7"),
        ("mllama", "vision_config", {"hidden_act": "relu"}, "hidden_act is 'relu'; supported: 'gelu'"),
        ("qwen_vl", None, {"no_bias": False}, "no_bias is False; supported: True"),
        ("qwen_vl", None, {"hidden_size": 128}, "visual output_dim is 256 but hidden_size is 128"),
        ("qwen_vl", None, {"visual": None}, "text-only Qwen"),
        ("qwen_vl", "visual", {"n_queries": 15}, "n_queries is 15; expected a square number"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, family: str, section: str | None, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(changed(family, tmp_path, section, **settings))


def test_unknown_keys_of_a_tower_apart(tmp_path: Path) -> None:
    tiny = tiny_llava(tmp_path / "tiny", layout="original")
    assert tiny.vision_tower
    path = tiny.vision_tower / "config.json"
    data = json.loads(path.read_text())
    before = read_config(tiny.folder, vision_tower=tiny.vision_tower)
    for changed in (data["vision_config"], data | {"vision_config": data["vision_config"] | {"mystery": 1}}):
        path.write_text(json.dumps(changed))
        if "vision_config" not in changed:  # the file of a tower alone
            assert read_config(tiny.folder, vision_tower=tiny.vision_tower) == before
            continue
        with pytest.raises(ConfigError, match=r"clip/config\.json, vision_config: unknown keys mystery"):
            read_config(tiny.folder, vision_tower=tiny.vision_tower)


# --- Keys that say nothing about the computation --------------------------------------------------------------------------

INERT = {
    "_attn_implementation": "sdpa",
    "_attn_implementation_autoset": True,
    "_attn_implementation_internal": "eager",
    "_flash_attn_2_enabled": True,
    "attn_implementation": "flash_attention_2",
    "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
    "gradient_checkpointing": False,
    "keys_to_ignore_at_inference": ["past_key_values"],
    "mystery_that_is_null": None,
    "quantization_config": None,
    "sliding_window": None,
    "tp_plan": None,
    "unsloth_fixed": True,
    "unsloth_version": "2025.1",
    "use_flash_attention_2": True,
}
SAVED = sorted((REPO / "tests" / "golden" / "configs").glob("*.json"))


@pytest.mark.parametrize(("family", "section"), SECTIONS)
def test_inert_keys(tmp_path: Path, family: str, section: str | None) -> None:
    notes: list[str] = []
    assert read_config(changed(family, tmp_path, section, **INERT), notes=notes) == read_config(CONFIGS[family])
    assert notes == []


@pytest.mark.parametrize("family", ["llava", "llava_next", "mllama"])
def test_attention_of_every_layer_is_full(tmp_path: Path, family: str) -> None:
    layers = read_config(CONFIGS[family]).text.layers
    full = ["full_attention"] * layers
    folder = changed(family, tmp_path, "text_config", layer_types=full, use_sliding_window=False)
    assert read_config(folder) == read_config(CONFIGS[family])
    for settings in (
        {"layer_types": [*full[1:], "sliding_attention"]},
        {"layer_types": full[1:]},
        {"use_sliding_window": True},
    ):
        with pytest.raises(ConfigError, match=rf"{next(iter(settings))} is .*; supported: "):
            read_config(changed(family, tmp_path, "text_config", **settings))


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_saved_by_versions_that_note_how_attention_was_chosen(tmp_path: Path, path: Path) -> None:
    """Files as transformers 4.46.3 and 4.49.0 wrote them."""
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    notes: list[str] = []
    assert read_config(tmp_path, notes=notes).family == path.stem.rpartition("-")[0]
    assert notes == []


def test_there_are_such_files() -> None:
    assert len(SAVED) == 6
    assert sum("_attn_implementation_autoset" in path.read_text() for path in SAVED) == 3


# --- Numbers out of all bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "section", "name"),
    [
        ("llava", "text_config", "num_hidden_layers"),
        ("llava", "text_config", "vocab_size"),
        ("llava", "text_config", "max_position_embeddings"),
        ("llava", "vision_config", "num_hidden_layers"),
        ("llava_next", "vision_config", "image_size"),
        ("mllama", "text_config", "vocab_size"),
        ("mllama", "vision_config", "max_num_tiles"),
        ("mllama", "vision_config", "num_global_layers"),
        ("qwen_vl", None, "num_hidden_layers"),
        ("qwen_vl", None, "vocab_size"),
        ("qwen_vl", "visual", "layers"),
        ("qwen_vl", "visual", "n_queries"),
    ],
)
@pytest.mark.parametrize("value", [10**9, 10**30])
def test_sizes_are_bounded(tmp_path: Path, family: str, section: str | None, name: str, value: int) -> None:
    """Before anything as large as that is made."""
    with pytest.raises(ConfigError, match=rf"{name} is {value}; expected at most \d+: correct the file"):
        read_config(changed(family, tmp_path, section, **{name: value}))


@pytest.mark.parametrize(
    ("family", "section", "settings", "message"),
    [
        (
            "mllama",
            "text_config",
            {"cross_attention_layers": 3},
            "cross_attention_layers is 3; expected a list of whole numbers",
        ),
        ("mllama", "vision_config", {"intermediate_layers_indices": ["a"]}, "expected a list of whole numbers"),
        ("mllama", "vision_config", {"supported_aspect_ratios": [[1]]}, "expected a list of pairs, rows and columns"),
        ("llava", None, {"eos_token_id": "x"}, "eos_token_id is 'x'; expected a token id"),
        ("llava", "text_config", {"bos_token_id": [1]}, r"bos_token_id is \[1\]; expected a token id"),
        ("llava", "text_config", {"rope_theta": float("inf")}, "rope_theta is inf; expected a positive number"),
    ],
)
def test_kinds_of_values(tmp_path: Path, family: str, section: str | None, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(changed(family, tmp_path, section, **settings))


def test_messages_are_bounded(tmp_path: Path) -> None:
    """A value or a thousand unknown keys are shown in part."""
    long = {f"key_{number}": 1 for number in range(1000)}
    for change in ({"model_type": "x" * 9000}, long, {"vision_feature_select_strategy": "y" * 9000}):
        folder = tiny_llava(tmp_path / str(len(list(tmp_path.iterdir())))).folder
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read_config(folder)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 700
