"""config.json of every family: an unknown key anywhere is refused by name, and a setting that is not implemented too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from staticvl.model_defs.config import ConfigError, read_config

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
