"""LLaVA-1.6 prompts: counts, order of rows and ids against transformers' own processor and packing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaNextModel, LlavaNextProcessor
from transformers.models.llava_next import modeling_llava_next
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from staticvl.runtime.artifact import ImageProcessorConfig, ModelInfo
from staticvl.runtime.processor.families import llava_next
from staticvl.runtime.processor.prompt import Message, PromptError
from staticvl.runtime.processor.tiles import grid_of
from staticvl.runtime.processor.tokenizer import Tokenizer

from .checkpoints import MEAN, STD, tiny_llava
from .test_llava_prompt import load, sample_image

NEWLINE = 400  # after every token of the tiny tokenizers
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
FLIPPED = tuple((columns, rows) for rows, columns in GRIDS)  # how the original code reads the same list
# (width, height) -> tokens: the figures of the published models.
COUNTS = {
    (336, 336): 1176, (100, 100): 1176, (672, 336): 1752, (1008, 336): 2328, (640, 480): 2340, (1024, 768): 2340,
    (480, 640): 2352, (1920, 1080): 1948, (1080, 1920): 1968, (672, 672): 2928, (1000, 300): 2182, (300, 1000): 2232,
    (700, 671): 2830, (4000, 200): 868, (1450, 20): 576, (200, 150): 1368,
}  # fmt: skip
# Covered lines that are whole but for rounding: 15 in transformers, 14 in the original code, and likewise.
ROUNDED = [(55, 88), (99, 88), (173, 4152), (4152, 173)]


def read_image_config(size: int, rows: int, grids: tuple[tuple[int, int], ...] = GRIDS) -> ImageProcessorConfig:
    return ImageProcessorConfig(
        mode="anyres", size=size, mean=tuple(MEAN), std=tuple(STD), rows=rows, grids=grids, newline_id=NEWLINE
    )  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelInfo, Tokenizer, str]:
    """A tokenizer with <image>, and facts of a tower of 28 x 28 pixels in 4 x 4 patches."""
    folder = tiny_llava(tmp_path_factory.mktemp("hf") / "tiny").folder
    info, tokenizer, template = load(folder)
    return folder, msgspec.structs.replace(info, family="llava_next", image=read_image_config(28, 16)), tokenizer, template


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelInfo, Tokenizer]:
    tiny = tiny_llava(tmp_path_factory.mktemp("original") / "tiny", layout="original")
    info, tokenizer, _ = load(tiny.folder, tiny.vision_tower)
    return msgspec.structs.replace(info, family="llava_next", image=read_image_config(28, 16, FLIPPED)), tokenizer


def at_full_size(info: ModelInfo, grids: tuple[tuple[int, int], ...] = GRIDS) -> ModelInfo:
    return msgspec.structs.replace(info, image=read_image_config(336, 576, grids))


def packed(size: tuple[int, int], grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Rows as LlavaNextModel packs features whose only channel is their own row; newlines are -1."""
    pinpoints = [[rows * 336, columns * 336] for rows, columns in grids]
    config: Any = SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=SimpleNamespace(image_size=336, patch_size=14))
    width, height = size
    tiles = modeling_llava_next.image_size_to_num_patches((height, width), pinpoints, 336)
    features = torch.arange(tiles * 576, dtype=torch.float64).reshape(tiles, 576, 1)
    model: Any = SimpleNamespace(config=config)
    (rows,), _ = LlavaNextModel.pack_image_features(
        model, [features], [(height, width)], "default", torch.tensor([-1.0], dtype=torch.float64)
    )
    return rows[:, 0].numpy()


def sizes(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(7)
    usual = [(int(w), int(h)) for w, h in rng.integers(1, 2500, (count, 2))]
    narrow = [(int(w), int(h)) for w, h in zip(rng.integers(1, 60, 30), rng.integers(200, 4000, 30), strict=True)]
    return [*COUNTS, *ROUNDED, *usual, *narrow, *((h, w) for w, h in narrow), (20, 1450), (1, 1), (1, 4000), (4000, 1)]


def test_rows_equal_the_packing_of_transformers(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    info = at_full_size(hf[1])
    every = sizes(200)
    assert len(every) > 250
    for size in every:
        np.testing.assert_array_equal(llava_next.image_rows(size, info), packed(size, GRIDS), err_msg=str(size))


def test_rows_of_the_original_layout(original: tuple[ModelInfo, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same packing without rounding, the list of grids read with the width first."""
    info = at_full_size(original[0], FLIPPED)
    monkeypatch.setattr(modeling_llava_next, "round", lambda value, digits: value, raising=False)
    for size in sizes(100):
        np.testing.assert_array_equal(llava_next.image_rows(size, info), packed(size, FLIPPED), err_msg=str(size))
    # The sizes at which rounding matters do so on the grids of transformers' order.
    same_order = at_full_size(original[0])
    for size in ROUNDED:
        np.testing.assert_array_equal(llava_next.image_rows(size, same_order), packed(size, GRIDS), err_msg=str(size))


def test_rounding_is_seen(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    rounded = at_full_size(hf[1])
    cut = msgspec.structs.replace(rounded, layout="original")
    for size in ROUNDED:
        assert len(llava_next.image_rows(size, rounded)) != len(llava_next.image_rows(size, cut))


def test_published_counts(hf: tuple[Path, ModelInfo, Tokenizer, str], original: tuple[ModelInfo, Tokenizer]) -> None:
    for size, count in COUNTS.items():
        assert len(llava_next.image_rows(size, at_full_size(hf[1]))) == count, size
        theirs = 1026 if size == (200, 150) else count
        assert len(llava_next.image_rows(size, at_full_size(original[0], FLIPPED))) == theirs, size


def processor(folder: Path, size: int, patch: int) -> LlavaNextProcessor:
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_grid_pinpoints=[[rows * size, columns * size] for rows, columns in GRIDS],
            image_mean=MEAN,
            image_std=STD,
        ),
        AutoTokenizer.from_pretrained(folder),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def test_counts_equal_the_processor(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    info = at_full_size(hf[1])
    every = sizes(300)
    counted = processor(hf[0], 336, 14)._get_num_multimodal_tokens([(height, width) for width, height in every])
    assert [len(llava_next.image_rows(size, info)) for size in every] == counted.num_image_tokens


@pytest.mark.parametrize("sizes", [[], [(40, 30)], [(28, 28), (31, 90), (5, 3), (200, 40)]])
def test_prompt_equals_the_processor(hf: tuple[Path, ModelInfo, Tokenizer, str], sizes: list[tuple[int, int]]) -> None:
    folder, info, tokenizer, template = hf
    images = [sample_image(*size, seed=i) for i, size in enumerate(sizes)]
    messages = [Message("user", "What is in the picture?", images=len(images))]
    text = llava_next.to_text(messages, template, info, tokenizer)
    expected = processor(folder, 28, 7)(images=images or None, text=text, return_tensors="np")

    prompt = llava_next.chat_prompt(messages, images, info, tokenizer, template)
    assert prompt.token_ids.dtype == prompt.rows.dtype == prompt.state.dtype == np.int32
    newline = prompt.token_ids == info.image.newline_id
    image_id = info.tokenizer.image_token_id
    np.testing.assert_array_equal(np.where(newline, image_id, prompt.token_ids), expected["input_ids"][0])
    shown = prompt.token_ids == image_id
    assert (prompt.rows[shown] >= 0).all() and (prompt.rows[~shown] == -1).all()
    assert prompt.image_tokens == np.count_nonzero(shown | newline)
    assert prompt.text_tokens == prompt.length - prompt.image_tokens
    assert not prompt.state.any() and prompt.grids is None and prompt.cross_attention is None
    tiles = [1 + np.prod(grid_of(size, info.image)) for size in sizes]
    assert prompt.pixels.shape == (sum(tiles), 28, 28, 3) and prompt.pixels.dtype == np.uint8
    normalised = ((prompt.pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    ends = np.cumsum(tiles)
    for place, (end, count) in enumerate(zip(ends, tiles, strict=True)):
        np.testing.assert_allclose(normalised[end - count : end], expected["pixel_values"][place][:count], atol=1e-6)
    assert [(frame.left, frame.top, frame.width, frame.height) for frame in prompt.frames] == [(0, 0, *p) for p in sizes]


def test_images_follow_each_other_in_the_rows(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    _, info, tokenizer, _ = hf
    first, second = (40, 30), (30, 90)
    prompt = llava_next.raw_prompt("<image>x<image>", [sample_image(*first), sample_image(*second)], info, tokenizer)
    alone, after = (llava_next.image_rows(size, info) for size in (first, second))
    behind = 16 * (1 + int(np.prod(grid_of(first, info.image))))
    moved = np.where(after >= 0, after + behind, -1)
    assert prompt.rows.tolist() == [-1, *alone.tolist(), -1, *moved.tolist()]
    assert prompt.rows.max() < 16 * len(prompt.pixels)


def test_a_small_image_by_hand(original: tuple[ModelInfo, Tokenizer]) -> None:
    """A square on two tiles, one above the other: of 8 lines of 4 patches it covers the 4 in the middle."""
    info, tokenizer = original
    info = msgspec.structs.replace(info, image=read_image_config(28, 16, ((2, 1),)))
    prompt = llava_next.raw_prompt("<image>", [sample_image(20, 20)], info, tokenizer)
    base = list(range(16))
    lines = [24, 25, 26, 27, -1, 28, 29, 30, 31, -1, 32, 33, 34, 35, -1, 36, 37, 38, 39, -1]
    assert prompt.rows.tolist() == [-1, *base, *lines]
    ids = [0, 0, 0, 0, NEWLINE]
    assert prompt.token_ids.tolist() == [1, *[0] * 16, *ids * 4]
    assert (prompt.image_tokens, prompt.text_tokens, len(prompt.pixels)) == (36, 1, 3)


def test_errors(hf: tuple[Path, ModelInfo, Tokenizer, str]) -> None:
    _, info, tokenizer, _ = hf
    image: Image.Image = sample_image(5, 5)
    with pytest.raises(PromptError, match="the prompt has 1 <image> mark but 2 images were given; write <image> once"):
        llava_next.raw_prompt("<image> x", [image] * 2, info, tokenizer)
    with pytest.raises(PromptError, match="the prompt has 0 <image> marks but 1 image was given"):
        llava_next.raw_prompt("x", [image], info, tokenizer)
