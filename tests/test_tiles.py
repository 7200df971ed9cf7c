"""Images cut into tiles or stretched: pixels and sizes against the reference processors, and where the answer points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_all_supported_aspect_ratios,
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

from staticvl.runtime.artifact import ImageProcessorConfig
from staticvl.runtime.processor.images import Frame, frame_of, load_image, stack_pixels, to_pixels
from staticvl.runtime.processor.tiles import canvas_size, grid_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # of LLaVA-1.6 as transformers orders them
CANVASES = tuple(get_all_supported_aspect_ratios(4))
GOLDEN = Path(__file__).parent / "golden" / "qwen_vl_tiny"
# (width, height); of the published sizes down to one pixel, odd ones, and very narrow ones
SIZES = [(336, 336), (640, 480), (480, 640), (1920, 1080), (2000, 900), (300, 10), (10, 300), (1000, 300), (337, 335), (1, 1)]
SIZES += [(1, 700), (700, 1), (1450, 20), (20, 1450), (200, 150), (671, 673), (1009, 335), (560, 561), (3, 2), (113, 1117)]


def anyres(size: int = 28, grids: tuple[tuple[int, int], ...] = GRIDS) -> ImageProcessorConfig:
    return ImageProcessorConfig(mode="anyres", size=size, mean=MEAN, std=STD, rows=16, grids=grids, newline_id=400)


def tiled(size: int = 28) -> ImageProcessorConfig:
    return ImageProcessorConfig(mode="tiles", size=size, mean=MEAN, std=STD, rows=5, resample=2, grids=CANVASES, tiles=4)


def sample_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_sizes(count: int, most: int) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in np.random.default_rng(5).integers(1, most, (count, 2))]


def next_processor(size: int) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=[[rows * size, columns * size] for rows, columns in GRIDS],
    )


def mllama_processor(size: int) -> MllamaImageProcessorPil:
    return MllamaImageProcessorPil(
        size={"height": size, "width": size}, max_image_tiles=4, resample=2, image_mean=list(MEAN), image_std=list(STD)
    )


def unscaled(values: np.ndarray) -> np.ndarray:
    """[tiles, 3, S, S] of whole numbers -> uint8 [tiles, S, S, 3]."""
    assert (values == values.astype(np.uint8)).all()
    return values.astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("size", "sizes"), [(336, SIZES), (28, SIZES + random_sizes(60, 160))])
def test_anyres_equals_llava_next(size: int, sizes: list[tuple[int, int]]) -> None:
    processor = next_processor(size)
    for place, (width, height) in enumerate(sizes):
        image = sample_image(width, height, seed=place)
        expected = unscaled(processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0])
        pixels = to_pixels(image, anyres(size))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected, err_msg=f"{width} x {height} to {size}")


@pytest.mark.parametrize(("size", "sizes"), [(560, SIZES[::2]), (448, SIZES[1::2]), (28, SIZES + random_sizes(60, 160))])
def test_tiles_equal_mllama(size: int, sizes: list[tuple[int, int]]) -> None:
    processor = mllama_processor(size)
    for place, (width, height) in enumerate(sizes):
        image = sample_image(width, height, seed=place)
        made = processor(image, do_rescale=False, do_normalize=False)
        np.testing.assert_array_equal(
            to_pixels(image, tiled(size)), unscaled(made["pixel_values"][0, 0]), err_msg=f"{width} x {height} to {size}"
        )
        grid = grid_of((width, height), tiled(size))
        assert CANVASES.index(grid) + 1 == made["aspect_ratio_ids"][0, 0]
        assert grid[0] * grid[1] == made["num_tiles"][0][0] == made["aspect_ratio_mask"].sum()


def test_normalised_pixels_equal_the_processors() -> None:
    """The graph's arithmetic on our pixels; tiles that are not in use are exactly 0 there."""
    image = sample_image(80, 25)
    for of, processor in ((anyres(), next_processor(28)), (tiled(), mllama_processor(28))):
        expected = processor(image)["pixel_values"]
        ours = (to_pixels(image, of) / 255 - np.array(MEAN)) / np.array(STD)
        if of.mode == "tiles":
            rows, columns = grid_of(image.size, of)
            assert (rows, columns) == (1, 3)
            ours[rows * columns :] = 0
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), np.asarray(expected).reshape(-1, 3, 28, 28), atol=1e-6)


def test_canvases_equal_mllama_at_many_sizes() -> None:
    edges = [(560 * a + b, 560 * c + d) for a in (1, 2, 4) for c in (1, 2, 3) for b in (-1, 0, 1) for d in (-1, 0, 1)]
    for width, height in random_sizes(3000, 5000) + edges:
        canvas = get_optimal_tiled_canvas(height, width, 4, 560)
        grid = grid_of((width, height), tiled(560))
        assert (grid[0] * 560, grid[1] * 560) == canvas, (width, height)
        high, wide = get_image_size_fit_to_canvas(height, width, *canvas, 560)
        assert canvas_size((width, height), grid, 560) == (wide, high), (width, height)


@pytest.mark.parametrize(
    ("size", "at_560", "at_448"),
    [
        ((560, 560), ((1, 1), (560, 560)), ((2, 2), (560, 560))),
        ((640, 480), ((1, 2), (640, 480)), ((2, 2), (640, 480))),
        ((480, 640), ((2, 1), (480, 640)), ((2, 2), (480, 640))),
        ((1920, 1080), ((2, 2), (1120, 630)), ((2, 2), (896, 504))),
        ((3000, 500), ((1, 4), (2240, 373)), ((1, 4), (1792, 298))),
        ((1200, 400), ((1, 3), (1200, 400)), ((1, 3), (1200, 400))),
        ((100, 100), ((1, 1), (560, 560)), ((1, 1), (448, 448))),
    ],
)
def test_canvases_by_hand(size: tuple[int, int], at_560: object, at_448: object) -> None:
    for side, expected in ((560, at_560), (448, at_448)):
        grid = grid_of(size, tiled(side))
        assert (grid, canvas_size(size, grid, side)) == expected


def test_equal_grids_are_taken_in_the_order_of_the_checkpoint() -> None:
    """200 x 150 fits one row of two tiles as well as one column: the original code lists the column first."""
    assert grid_of((200, 150), anyres(336)) == (1, 2)
    width_first = tuple((columns, rows) for rows, columns in GRIDS)
    assert grid_of((200, 150), anyres(336, width_first)) == (2, 1)
    assert grid_of((1000, 300), anyres(336, width_first)) == grid_of((1000, 300), anyres(336)) == (1, 3)


def test_grids_beyond_the_tiles_of_a_image_are_not_taken() -> None:
    wide = ImageProcessorConfig(mode="tiles", size=28, mean=MEAN, std=STD, rows=5, grids=((1, 1), (1, 2), (1, 4)), tiles=2)
    assert grid_of((400, 100), wide) == (1, 2)
    assert to_pixels(sample_image(400, 100), wide).shape == (2, 28, 28, 3)


def test_stretch_equals_the_golden_pixels() -> None:
    side = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())["visual"]["image_size"]
    info = ImageProcessorConfig(mode="stretch", size=side, mean=MEAN, std=STD, rows=16, alpha="drop")
    golden = load_file(GOLDEN / "cases" / "image_preprocess.safetensors")
    assert set(golden) == {"img0.png", "rgba.png"}
    for name, expected in golden.items():
        pixels = to_pixels(load_image(GOLDEN / "images" / name, alpha=info.alpha), info)
        assert pixels.shape == (1, side, side, 3) and pixels.dtype == np.uint8
        restored = expected.transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
        np.testing.assert_array_equal(pixels[0], np.rint(restored * 255).astype(np.uint8))
        normalised = (pixels[0] / 255 - np.array(MEAN)) / np.array(STD)
        np.testing.assert_allclose(normalised.transpose(2, 0, 1), expected, atol=1e-6)


def test_images_are_stacked_in_order() -> None:
    images = [sample_image(30, 90), sample_image(90, 30, seed=1)]
    stacked = stack_pixels(images, anyres())
    np.testing.assert_array_equal(stacked, np.concatenate([to_pixels(image, anyres()) for image in images]))
    assert stack_pixels([], anyres()).shape == (0, 28, 28, 3)
    assert stack_pixels(images, tiled()).shape == (8, 28, 28, 3)


def test_coordinates_refer_to_the_whole_image() -> None:
    stretch = ImageProcessorConfig(mode="stretch", size=28, mean=MEAN, std=STD, rows=16)
    for info in (anyres(), tiled(), stretch):
        frame = frame_of((640, 480), info)
        assert frame == Frame(left=0, top=0, width=640, height=480, image_width=640, image_height=480)
        assert frame.point(0.25, 0.5) == (160, 240)
