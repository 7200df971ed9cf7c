"""The real files of published models parse; every tensor has its place, and sizes that follow are the published ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from staticvl.compiler.plan import Buckets, Options, forecast, make_plan
from staticvl.model_defs.config import ClipConfig, ModelConfig, ResampledConfig, TiledConfig, read_config
from staticvl.tools.known_models import MODELS, write_known_model
from staticvl.weights.shard import possible_tp, rank_parameters, rank_shape, shard_axis
from staticvl.weights.storage import QUANTS, stored_targets, uniform
from staticvl.weights.weight_map import assign, source_names, targets

from .conftest import PUBLISHED

pytestmark = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published config files are not here")

HF, ORIGINAL = PUBLISHED / "llava-hf--llava-1.5-7b-hf", PUBLISHED / "liuhaotian--llava-v1.5-7b"
CLIP = PUBLISHED / "openai--clip-vit-large-patch14-336"
SMALL, LARGE = (PUBLISHED / f"meta-llama--Llama-3.2-{size}-Vision-Instruct" for size in ("11B", "90B"))
QWEN, QWEN_CHAT = PUBLISHED / "Qwen--Qwen-VL", PUBLISHED / "Qwen--Qwen-VL-Chat"
PARAMETERS = {  # of the checkpoint, layers that nothing runs included
    HF.name: 7_063_427_072,
    ORIGINAL.name: 7_062_902_784,  # with CLIP
    SMALL.name: 10_670_220_835,
    LARGE.name: 88_593_355_323,
    QWEN.name: 9_656_935_168,
    QWEN_CHAT.name: 9_656_935_168,
    "llava-1.5-7b-hf": 7_063_427_072,
    "llava-1.5-13b-hf": 13_351_494_656,
    "llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-v1.6-vicuna-13b-hf": 13_351_499_776,
}
TP = (1, 2, 4, 8)


def config_of(name: str, tmp_path: Path) -> ModelConfig:
    if name not in MODELS:
        return read_config(PUBLISHED / name)
    write_known_model(name, tmp_path)
    return read_config(tmp_path)


def test_every_published_model_is_here() -> None:
    found = {path.parent.name for path in PUBLISHED.glob("*/config.json")} - {CLIP.name}
    assert found == PARAMETERS.keys() - MODELS.keys()


# --- Configs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "tower", "rows"),
    [(HF, None, 32064), (ORIGINAL, None, 32000), (ORIGINAL, CLIP, 32000)],
    ids=["hf", "original", "tower"],
)
def test_llava_7b(folder: Path, tower: Path | None, rows: int) -> None:
    config = read_config(folder, vision_tower=tower)
    text, vision = config.text, config.vision
    assert isinstance(vision, ClipConfig)
    assert (text.hidden_size, text.layers, text.heads, text.kv_heads, text.head_dim) == (4096, 32, 32, 32, 128)
    assert (text.intermediate_size, text.vocab_size, text.max_positions) == (11008, rows, 4096)
    assert (text.rms_norm_eps, text.rope.theta, text.rope.llama3) == (1e-5, 10000.0, None)
    assert (vision.hidden_size, vision.layers, vision.used_layers, vision.heads, vision.patches) == (1024, 24, 23, 16, 576)
    assert vision.activation == "quick_gelu"
    assert config.eos_token_ids == (2,)
    assert config.image_mode == ("crop" if folder == HF else "pad")


def test_a_known_model_is_the_published_one(tmp_path: Path) -> None:
    assert config_of("llava-1.5-7b-hf", tmp_path) == read_config(HF)


@pytest.mark.parametrize(("size", "text"), [("7b", (4096, 32, 32, 11008)), ("13b", (5120, 40, 40, 13824))], ids=["7b", "13b"])
def test_llava_next(tmp_path: Path, size: str, text: tuple[int, ...]) -> None:
    config = config_of(f"llava-v1.6-vicuna-{size}-hf", tmp_path)
    assert (config.family, config.image_mode, config.image_token_id) == ("llava_next", "anyres", 32000)
    assert (config.text.hidden_size, config.text.layers, config.text.kv_heads, config.text.intermediate_size) == text
    assert (config.text.embed_rows, config.text.all_embed_rows, config.text.vocab_size) == (32064, 32065, 32064)
    assert config.grids == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@pytest.mark.parametrize(
    ("folder", "text", "cross"), [(SMALL, (4096, 40, 32, 14336), 8), (LARGE, (8192, 100, 64, 28672), 20)], ids=["11b", "90b"]
)
def test_llama_vision(folder: Path, text: tuple[int, ...], cross: int) -> None:
    config = read_config(folder)
    vision, rope = config.vision, config.text.rope
    assert isinstance(vision, TiledConfig) and rope.llama3
    assert (config.text.hidden_size, config.text.layers, config.text.heads, config.text.intermediate_size) == text
    assert config.text.cross_layers == tuple(range(3, 5 * cross, 5)) and config.text.kv_heads == 8
    assert (config.text.vocab_size, config.text.embed_rows, config.text.max_positions) == (128256, 128264, 131072)
    assert (rope.theta, rope.llama3.factor, rope.llama3.original_positions) == (500000.0, 8.0, 8192)
    assert (vision.hidden_size, vision.layers, vision.global_layers, vision.heads) == (1280, 32, 8, 16)
    assert (vision.rows_per_tile, vision.padded_rows, vision.rows_per_image, vision.feature_size) == (1601, 1608, 6404, 7680)
    assert vision.taps == (3, 7, 15, 23, 30) and len(vision.ratios) == 8
    assert config.eos_token_ids == (128001, 128008, 128009) and config.image_token_id == 128256


@pytest.mark.parametrize("folder", [QWEN, QWEN_CHAT], ids=["base", "chat"])
def test_qwen_vl(folder: Path) -> None:
    config = read_config(folder)
    text, vision = config.text, config.vision
    assert isinstance(vision, ResampledConfig)
    assert (text.hidden_size, text.layers, text.heads, text.kv_heads, text.head_dim) == (4096, 32, 32, 32, 128)
    assert (text.intermediate_size, text.vocab_size, text.max_positions, text.qkv_bias) == (11008, 151936, 8192, True)
    assert (text.rope.theta, text.rope.ntk_positions, text.rope.logn_positions) == (10000.0, 2048, 2048)
    assert (vision.hidden_size, vision.layers, vision.heads, vision.intermediate_size) == (1664, 48, 16, 8192)
    assert (vision.patches, vision.queries, vision.output_size, vision.stored_positions) == (1024, 256, 4096, 256)
    assert (config.image_token_id, config.eos_token_ids) == (151859, (151643,))


# --- Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_exactly(tmp_path: Path, name: str) -> None:
    names = source_names(config_of(name, tmp_path))
    assert sum(math.prod(shape) for shape in names.values()) == PARAMETERS[name]


INDEXES = {  # file, tensors, those left out, parameters in other places
    HF: ("model.safetensors.index.json", 686, 18),
    ORIGINAL: ("pytorch_model.bin.index.json", 327, 32),
    QWEN: ("pytorch_model.bin.index.json", 853, 0),
    QWEN_CHAT: ("pytorch_model.bin.index.json", 853, 0),
}


def test_every_index_is_tested() -> None:
    assert {path.parent for path in PUBLISHED.glob("*/*.index.json")} == INDEXES.keys()


@pytest.mark.parametrize("folder", INDEXES, ids=lambda folder: folder.name)
def test_every_tensor_of_an_index_has_its_place(folder: Path) -> None:
    file, count, left_out = INDEXES[folder]
    config, index = read_config(folder), json.loads((folder / file).read_text())
    found, ignored, unknown = assign(config, index["weight_map"])
    assert not unknown and len(ignored) == left_out and len(found) + len(ignored) == len(index["weight_map"]) == count
    names = source_names(config)
    inside = {name: shape for name, shape in names.items() if not name.startswith("tower/")}
    buffers = [name for name in index["weight_map"] if name not in names]
    assert inside.keys() == index["weight_map"].keys() - set(buffers)
    inv_freq = len(buffers) * 4 * config.text.head_dim // 2  # in float32; all else takes two bytes
    assert all(name.endswith("inv_freq") for name in buffers)
    assert sum(2 * math.prod(shape) for shape in inside.values()) + inv_freq == index["metadata"]["total_size"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_published_model_can_be_cut(tmp_path: Path, name: str) -> None:
    """Ranks together hold every parameter that is cut once, and all others each."""
    config = config_of(name, tmp_path)
    assert set(TP) <= set(possible_tp(config))
    for tp in TP:
        for target, shape in targets(config).items():
            times = 1 if shard_axis(config, target) is None else tp
            part = rank_shape(config, target, shape, tp)
            assert math.prod(part) * times == math.prod(shape) and len(part) == len(shape)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_ranks_hold_hardly_more_than_the_model(tmp_path: Path, name: str, quant: str) -> None:
    """Shown with -s: bytes of all ranks together. In 8 bits a row that was cut may have to be stored in smaller blocks."""
    config = config_of(name, tmp_path)
    for dtype in ("float32", "bfloat16"):
        held = [tp * sum(each.nbytes for each in stored_targets(config, quant, uniform(dtype), tp).values()) for tp in TP]
        print(f"\n{name} {quant} {dtype}:", *(f"{tp} ranks {total / 1e9:.3f} GB" for tp, total in zip(TP, held, strict=True)))
        assert all(total <= 1.03 * held[0] for total in held)


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_every_rank_holds_is_small(tmp_path: Path, name: str) -> None:
    config = config_of(name, tmp_path)
    sizes = {target: math.prod(shape) for target, shape in targets(config).items()}
    whole = sum(size for target, size in sizes.items() if shard_axis(config, target) is None)
    assert whole <= 0.0011 * sum(sizes.values())


# What one rank holds by the fact sheets, in GB of 16-bit numbers. They keep more whole than we do: these parameters. They count
# CLIP's last layer, which nothing runs, and Qwen's tables of positions as they are stored.
WHOLE_THERE: dict[type, tuple[str, ...]] = {
    ClipConfig: ("vision.", "projector."),
    TiledConfig: ("vision.positions.",),
    ResampledConfig: ("projector.",),
}
SHEETS = {
    HF.name: (14.13, 7.39, 4.02, 2.33),
    "llava-1.5-13b-hf": (26.70, 13.69, 7.18, 3.92),
    "llava-v1.6-vicuna-7b-hf": (14.13, 7.39, 4.02, 2.33),
    "llava-v1.6-vicuna-13b-hf": (26.70, 13.69, 7.18, 3.92),
    SMALL.name: (21.34, 10.75, 5.45, 2.80),
    LARGE.name: (177.19, 88.67, 44.41, 22.28),
    QWEN.name: (19.31, 9.68, 4.86, 2.45),
}


@pytest.mark.parametrize("name", SHEETS)
def test_parameters_of_a_rank(tmp_path: Path, name: str) -> None:
    config = config_of(name, tmp_path)
    ours = targets(config)
    whole = sum(map(math.prod, ours.values()))
    uncounted = PARAMETERS[name] - whole
    for tp, expected in zip(TP, SHEETS[name], strict=True):
        held = rank_parameters(config, tp)
        assert tp > 1 or held == whole
        kept = {target: shape for target, shape in ours.items() if target.startswith(WHOLE_THERE[type(config.vision)])}
        cut_here = sum(math.prod(shape) - math.prod(rank_shape(config, name, shape, tp)) for name, shape in kept.items())
        assert abs(2 * (held + cut_here + uncounted) / 1e9 - expected) < 0.0101


def test_forecast_of_7b_is_the_published_size() -> None:
    config = read_config(HF)
    options = Options(checkpoint=HF, out=Path("unused"), buckets=Buckets(context=4096, slots=1))
    sizes = forecast(config, make_plan(config, options), options, options.floats({}))
    # 7,063,427,072 stored, less the last vision layer and the norm after it, which are never run.
    unused = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024
    assert sizes["parameters"] == 7_063_427_072 - unused
    assert sizes["weight_bytes"] == 4 * sizes["parameters"]
    assert sizes["cache_bytes"] == (4096 + 16) * 2 * 32 * 4096 * 4
