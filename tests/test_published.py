"""The real files of published models parse; the sizes that follow from them are the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from staticvl.compiler.plan import Buckets, Options, forecast, make_plan
from staticvl.model_defs.config import read_config

from .conftest import PUBLISHED

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published config files are not here")

HF, ORIGINAL = PUBLISHED / "llava-hf--llava-1.5-7b-hf", PUBLISHED / "liuhaotian--llava-v1.5-7b"
CLIP = PUBLISHED / "openai--clip-vit-large-patch14-336"


@pytest.mark.parametrize(
    ("folder", "tower", "rows"),
    [(HF, None, 32064), (ORIGINAL, None, 32000), (ORIGINAL, CLIP, 32000)],
    ids=["hf", "original", "tower"],
)
def test_llava_7b(folder: Path, tower: Path | None, rows: int) -> None:
    config = read_config(folder, vision_tower=tower)
    text, vision = config.text, config.vision
    assert (text.hidden_size, text.layers, text.heads, text.kv_heads, text.head_dim) == (4096, 32, 32, 32, 128)
    assert (text.intermediate_size, text.vocab_size, text.max_positions) == (11008, rows, 4096)
    assert (text.rms_norm_eps, text.rope_theta) == (1e-5, 10000.0)
    assert (vision.hidden_size, vision.layers, vision.used_layers, vision.heads, vision.patches) == (1024, 24, 23, 16, 576)
    assert vision.activation == "quick_gelu"
    assert config.eos_token_ids == (2,)
    assert config.image_mode == ("crop" if folder == HF else "pad")


def test_forecast_of_7b_is_the_published_size() -> None:
    config = read_config(HF)
    options = Options(checkpoint=HF, out=Path("unused"), buckets=Buckets(context=4096, slots=1))
    sizes = forecast(config, make_plan(config, options), "none")
    # 7,063,427,072 stored, less the last vision layer and the norm after it, which are never run.
    unused = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024
    assert sizes["parameters"] == 7_063_427_072 - unused
    assert sizes["weight_bytes"] == 4 * sizes["parameters"]
    assert sizes["cache_bytes"] == (4096 + 16) * 2 * 32 * 4096 * 4
