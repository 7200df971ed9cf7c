"""Every kind of image file, in every way that it may be given, against transformers' own loader and processors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image as transformers_load
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil, get_all_supported_aspect_ratios

from staticvl.runtime.artifact import ImageProcessorConfig
from staticvl.runtime.processor.images import ImageSource, load_image, to_pixels

from .image_kinds import Kind, all_kinds

S = 28
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[rows * S, columns * S] for rows, columns in GRIDS]
KINDS = all_kinds()

CROP = {"size": {"shortest_edge": S}, "crop_size": {"height": S, "width": S}, "resample": 3}
TILES = {"size": {"height": S, "width": S}, "max_image_tiles": 4, "resample": 2}
PROCESSORS = {
    "crop": CLIPImageProcessorPil(**CROP),
    "pad": LlavaImageProcessorPil(**CROP, image_mean=MEAN, do_pad=True),
    "anyres": LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=PINPOINTS),
    "tiles": MllamaImageProcessorPil(**TILES),
}
MODES = {
    "crop": {"rows": 4},
    "pad": {"rows": 4},
    "anyres": {"rows": 4, "grids": GRIDS, "newline_id": 400},
    "tiles": {"rows": 5, "resample": 2, "grids": tuple(get_all_supported_aspect_ratios(4)), "tiles": 4},
    "stretch": {"rows": 4, "alpha": "drop"},
}
FACTS = {mode: ImageProcessorConfig(mode=mode, size=S, mean=MEAN, std=STD, **more) for mode, more in MODES.items()}  # type: ignore[arg-type]


def processed(image: Image.Image, mode: str) -> np.ndarray:
    """What the family's processor makes before rescaling, uint8 [tiles, S, S, 3]; Qwen-VL by the formula of its code."""
    if mode == "stretch":
        return np.asarray(image.convert("RGB").resize((S, S), Image.Resampling.BICUBIC))[None]
    values = np.asarray(PROCESSORS[mode](image, do_rescale=False, do_normalize=False)["pixel_values"])
    return values.reshape(-1, 3, S, S).transpose(0, 2, 3, 1).astype(np.uint8)


def reference(kind: Kind, path: Path, mode: str) -> Image.Image:
    """The file as transformers' loader opens it; where it drops transparency or clips, what is stated instead."""
    if kind.shades is not None:
        return Image.fromarray(kind.shades).convert("RGB")
    if kind.clear and mode != "stretch":
        return ImageOps.exif_transpose(Image.open(path))  # laid over white by the processor
    return transformers_load(str(path))


def ways(path: Path) -> dict[str, Callable[[], ImageSource]]:
    """Fresh sources of one file."""
    data = path.read_bytes()
    coded = base64.b64encode(data).decode()
    return {
        "path": lambda: path,
        "name": lambda: str(path),
        "bytes": lambda: data,
        "file": lambda: io.BytesIO(data),
        "data URL": lambda: f"data:image/{path.suffix[1:]};base64,{coded}",
        "base64": lambda: coded,
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_files_equal_transformers(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "image.bin"
    path.write_bytes(kind.data)
    for mode, info in FACTS.items():
        loaded = load_image(path, alpha=info.alpha)
        np.testing.assert_array_equal(to_pixels(loaded, info), processed(reference(kind, path, mode), mode), err_msg=mode)
    for alpha in ("white", "drop"):
        expected = np.asarray(load_image(path, alpha=alpha))
        for way, source in ways(path).items():
            np.testing.assert_array_equal(np.asarray(load_image(source(), alpha=alpha)), expected, err_msg=way)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_objects_equal_the_processors(kind: Kind, tmp_path: Path) -> None:
    """A processor turns nothing, so a PIL image is not turned; but TIFF is, by Pillow."""
    path = tmp_path / "image.bin"
    path.write_bytes(kind.data)
    for mode, info in FACTS.items():
        ours = to_pixels(load_image(Image.open(path), alpha=info.alpha), info)
        given = Image.open(path)
        if kind.shades is not None:
            shades = kind.shades if kind.shades.shape == given.size[::-1] else np.rot90(kind.shades)
            given = Image.fromarray(shades).convert("RGB")
        np.testing.assert_array_equal(ours, processed(given, mode), err_msg=mode)


def test_the_kinds_are_what_they_are_called() -> None:
    """At least 45, each with a name of its own; those that are turned stand on their side where they should."""
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 45
    for kind in KINDS:
        image = load_image(kind.data)
        if kind.name.startswith("orientation"):
            assert (image.height > image.width) == (int(kind.name.split()[1]) >= 5), kind.name
        assert len(np.unique(np.asarray(image))) > 1 or kind.name.startswith("dark"), kind.name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.clear], ids=lambda kind: kind.name)
def test_transparent_parts(kind: Kind, tmp_path: Path) -> None:
    """White here and in the processors; transformers' loader, which a processor never sees, shows hidden colours."""
    path = tmp_path / "image.bin"
    path.write_bytes(kind.data)
    over_white, dropped = np.asarray(load_image(path)), np.asarray(load_image(path, alpha="drop"))
    assert (over_white != dropped).any()
    np.testing.assert_array_equal(dropped, np.asarray(transformers_load(str(path))))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_loaded_image_stays_what_it_is(kind: Kind) -> None:
    """Given again to our loader or to transformers': nothing of the file is left that would count twice."""
    once = load_image(kind.data)
    assert once.info == {} and dict(once.getexif()) == {}
    for again in (load_image(once, alpha="white"), load_image(once, alpha="drop"), transformers_load(once)):
        np.testing.assert_array_equal(np.asarray(again), np.asarray(once))
