"""How images become pixels, from image settings in the forms of the published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil, get_all_supported_aspect_ratios

from staticvl.compiler.image_config import CLIP_MEAN, CLIP_STD, read_image_config
from staticvl.model_defs.config import ConfigError, read_config
from staticvl.runtime.artifact import ImageProcessorConfig

from .conftest import PUBLISHED

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
COMMON = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
CLIP = COMMON | {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
LLAVA_NEXT = CLIP | {
    "aspect_ratio_setting": "anyres", "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_pad": True,
    "image_grid_pinpoints": PINPOINTS, "image_processor_type": "LlavaNextImageProcessor", "resample": 3,
    "size": {"shortest_edge": 336},
}  # fmt: skip
MLLAMA = CLIP | {
    "do_pad": True, "image_processor_type": "MllamaImageProcessor", "max_image_tiles": 4, "resample": 2,
    "size": {"height": 560, "width": 560},
}  # fmt: skip
TEXT = {"vocab_size": 32064, "model_type": "llama"}
VISION = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "llava", "text_config": TEXT, "vision_config": VISION},
    "llava_next": {
        "model_type": "llava_next", "text_config": TEXT, "vision_config": VISION, "image_grid_pinpoints": PINPOINTS,
    },
    "original": {
        "model_type": "llava", "vocab_size": 32000, "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "image_grid_pinpoints": str(PINPOINTS),
    },
    "mllama": {"model_type": "mllama", "text_config": {}, "vision_config": {"image_size": 560}},
    "qwen_vl": {"model_type": "qwen", "visual": {"image_size": 448}},
}  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def info(
    folder: Path,
    name: str,
    settings: dict[str, Any] | None = None,
    processor: dict[str, Any] | None = None,
    tower: Path | None = None,
) -> ImageProcessorConfig:
    """Facts of a checkpoint with the config `name` and these settings in preprocessor_config.json."""
    write(folder / "config.json", CONFIGS[name])
    if settings is not None:
        write(folder / "preprocessor_config.json", settings)
    return read_image_config(folder, read_config(folder), processor or {}, tower, "<mark>")


def test_llava_next(tmp_path: Path) -> None:
    expected = ImageProcessorConfig(
        mode="anyres", size=336, mean=CLIP_MEAN, std=CLIP_STD, rescale=1 / 255, resample=3, rows=576, mark="<mark>",
        grids=GRIDS, newline_id=32064,
    )  # fmt: skip
    assert info(tmp_path / "file", "llava_next", LLAVA_NEXT) == expected
    assert info(tmp_path / "none", "llava_next") == expected
    for do_pad in (False, None):  # of the batch alone
        assert info(tmp_path / "batch", "llava_next", LLAVA_NEXT | {"do_pad": do_pad}) == expected
    square = LLAVA_NEXT | {"size": {"height": 336, "width": 336}}
    assert info(tmp_path / "square", "llava_next", square) == expected
    nested = {"image_processor": LLAVA_NEXT | {"image_mean": [0.1, 0.2, 0.3]}, "patch_size": 14}
    assert info(tmp_path / "nested", "llava_next", processor=nested).mean == (0.1, 0.2, 0.3)


def test_original_llava_next(tmp_path: Path) -> None:
    """The settings are those of the tower stored apart; pairs of pixels have the width first."""
    write(tmp_path / "tower" / "preprocessor_config.json", CLIP | {"size": 336, "crop_size": 336, "image_std": [1, 2, 3]})
    found = info(tmp_path, "original", tower=tmp_path / "tower")
    assert (found.mode, found.size, found.rows, found.newline_id) == ("anyres", 336, 576, 32000)
    assert found.grids == tuple((columns, rows) for rows, columns in GRIDS)
    assert (found.std, found.alpha) == ((1, 2, 3), "white")


def test_mllama(tmp_path: Path) -> None:
    expected = ImageProcessorConfig(
        mode="tiles", size=560, mean=CLIP_MEAN, std=CLIP_STD, rescale=1 / 255, resample=2, rows=1601, mark="<mark>",
        grids=tuple(get_all_supported_aspect_ratios(4)), tiles=4,
    )  # fmt: skip
    assert info(tmp_path / "file", "mllama", MLLAMA) == expected
    assert info(tmp_path / "nested", "mllama", processor={"image_processor": MLLAMA}) == expected


def test_what_a_file_leaves_out_is_the_processors_default(tmp_path: Path) -> None:
    found = info(tmp_path / "mllama", "mllama", {"size": {"height": 560, "width": 560}})
    theirs = MllamaImageProcessorPil(size={"height": 560, "width": 560})
    assert (found.mean, found.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (found.resample, found.tiles) == (int(theirs.resample), theirs.max_image_tiles)
    found = info(tmp_path / "next", "llava_next", {"size": {"shortest_edge": 336}})
    theirs = LlavaNextImageProcessorPil()
    assert (found.mean, found.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert found.resample == int(theirs.resample)
    assert [[rows * 336, columns * 336] for rows, columns in found.grids] == theirs.image_grid_pinpoints


def test_qwen_vl_needs_no_file(tmp_path: Path) -> None:
    assert info(tmp_path, "qwen_vl") == ImageProcessorConfig(
        mode="stretch", size=448, mean=CLIP_MEAN, std=CLIP_STD, resample=3, rows=256, mark="<mark>", alpha="drop"
    )


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "llava_next",
            LLAVA_NEXT | {"size": {"shortest_edge": 224}},
            "size is 224 but the vision tower takes 336 x 336 pixels",
        ),
        ("llava_next", LLAVA_NEXT | {"crop_size": 224}, "crop_size is 224 but the vision tower takes 336"),
        (
            "llava_next",
            LLAVA_NEXT | {"size": {"height": 336, "width": 224}},
            "size is .*; expected one number under height and",
        ),
        ("llava_next", LLAVA_NEXT | {"aspect_ratio_setting": "pad"}, "aspect_ratio_setting is 'pad'; supported: 'anyres'"),
        (
            "llava_next",
            LLAVA_NEXT | {"image_grid_pinpoints": PINPOINTS[::-1]},
            r"image_grid_pinpoints is \[\[336, 1008\].* but that of config.json means \[\[336, 672\].*; make them agree",
        ),
        ("llava_next", LLAVA_NEXT | {"do_center_crop": False}, "do_center_crop is False; supported: true"),
        ("mllama", MLLAMA | {"size": {"height": 448, "width": 448}}, "size is 448 but the vision tower takes 560 x 560"),
        ("mllama", MLLAMA | {"size": {"height": 560, "width": 448}}, "size is .*; expected one number under height and width"),
        ("mllama", MLLAMA | {"size": {"shortest_edge": 560}}, "size is .*; expected one number under height and width"),
        ("mllama", MLLAMA | {"size": None}, "size is 224 but the vision tower takes 560"),
        ("mllama", MLLAMA | {"max_image_tiles": 2}, r"max_image_tiles is 2 but the vision tower takes 4 \(.*max_num_tiles\)"),
        ("mllama", MLLAMA | {"max_image_tiles": 0}, "max_image_tiles is 0; expected an integer of at least 1"),
        ("mllama", MLLAMA | {"do_pad": False}, "do_pad is False; supported: true"),
        ("mllama", MLLAMA | {"do_resize": False}, "do_resize is False; supported: true"),
        ("mllama", MLLAMA | {"size": {"height": [], "width": []}}, r"size is \[\]; expected a positive number of pixels"),
        ("mllama", MLLAMA | {"resample": 9}, "resample is 9; expected a PIL filter number, 0 to 5"),
    ],
)
def test_refused_settings(tmp_path: Path, name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json: {message}"):
        info(tmp_path, name, settings)


def test_mllama_needs_its_file(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"preprocessor_config\.json is missing; copy preprocessor_config\.json from the model"
    ):
        info(tmp_path, "mllama")


def test_grids_in_another_order_would_have_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = [list(ratio) for ratio in get_all_supported_aspect_ratios(4)]
    other = {"image_size": 560, "supported_aspect_ratios": ratios[::-1]}
    monkeypatch.setitem(CONFIGS, "mllama", CONFIGS["mllama"] | {"vision_config": other})
    with pytest.raises(
        ConfigError,
        match=r"cut into the grids \[\(1, 1\), .*supported_aspect_ratios is \[\(4, 1\), .*; expected the same list",
    ):
        info(tmp_path, "mllama", MLLAMA)


def test_llava_next_counts_its_rows(tmp_path: Path) -> None:
    processor = {"patch_size": 16, "vision_feature_select_strategy": "default"}
    with pytest.raises(ConfigError, match=r"patch_size 16, .* make 441 tokens per image but the vision tower gives 576"):
        info(tmp_path, "llava_next", LLAVA_NEXT, processor)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
@pytest.mark.parametrize(
    ("folder", "tower", "mode", "size", "rows"),
    [
        ("llava-hf--llava-1.5-7b-hf", None, "crop", 336, 576),
        ("liuhaotian--llava-v1.5-7b", "openai--clip-vit-large-patch14-336", "pad", 336, 576),
        ("meta-llama--Llama-3.2-11B-Vision-Instruct", None, "tiles", 560, 1601),
        ("Qwen--Qwen-VL-Chat", None, "stretch", 448, 256),
        ("Qwen--Qwen-VL", None, "stretch", 448, 256),
    ],
)
def test_published_files(folder: str, tower: str | None, mode: str, size: int, rows: int) -> None:
    path, apart = PUBLISHED / folder, PUBLISHED / tower if tower else None
    found = read_image_config(path, read_config(path, vision_tower=apart), {}, apart, "<mark>")
    assert (found.mode, found.size, found.rows) == (mode, size, rows)
    assert (found.mean, found.std, found.rescale) == (CLIP_MEAN, CLIP_STD, 1 / 255)
    assert found.resample == (2 if mode == "tiles" else 3)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published files are not here")
def test_the_published_form_of_llava_next(tmp_path: Path) -> None:
    form = json.loads((PUBLISHED / "derivative--llava-v1.6-mistral-7b-hf-lora" / "preprocessor_config.json").read_text())
    assert info(tmp_path, "llava_next", form) == info(tmp_path / "ours", "llava_next", LLAVA_NEXT)
