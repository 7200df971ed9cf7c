"""The image processor config: preprocessor_config.json and the image's part of processor_config.json.

Values that a file leaves out are those of the processor's own class in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model_defs.config import ClipConfig, ConfigError, ModelConfig, TiledConfig
from ..runtime.artifact import ImageProcessorConfig
from ..runtime.shown import quoted
from .json_values import integer, number, only, read_settings, three

# Of every CLIP tower that LLaVA uses, and of Qwen-VL; transformers' OPENAI_CLIP_MEAN and OPENAI_CLIP_STD.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# MllamaImageProcessor's defaults; transformers' IMAGENET_STANDARD_MEAN and _STD. The published files give CLIP's instead.
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = 2, 3


def read_image_config(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], vision_tower: Path | None, mark: str
) -> ImageProcessorConfig:
    """The image processor config, checked against `config`.

    `processor`: the contents of processor_config.json. `vision_tower`: the folder of a tower stored apart. `mark`: the text of
    an image in a prompt. Raises ConfigError.
    """
    if config.image_mode == "stretch":
        return _stretch(config, mark)  # Qwen-VL's preprocessing is fixed in its code
    settings, where = _image_settings(checkpoint, config, processor, vision_tower)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        only(settings, name, True, where)
    if isinstance(config.vision, TiledConfig):
        return _tiles(settings, where, config, config.vision, mark)
    if not isinstance(config.vision, ClipConfig):
        raise TypeError(f"a {config.family} model cannot have the image mode {quoted(config.image_mode)}")
    only(settings, "do_center_crop", True, where)
    _check_rows(checkpoint, config.vision, processor)
    return (_anyres if config.image_mode == "anyres" else _one_square)(settings, where, config, mark)


def _one_square(settings: Mapping[str, Any], where: str, config: ModelConfig, mark: str) -> ImageProcessorConfig:
    """LLaVA-1.5: CLIPImageProcessor, or LlavaImageProcessor, which may pad to a square."""
    _check_side("size", _side(settings, "size", {"shortest_edge"}, where), config, where)
    _check_side("crop_size", _side(settings, "crop_size", {"height", "width"}, where), config, where)
    return ImageProcessorConfig(
        mode="pad" if config.image_mode == "pad" or _pads(settings, where) else "crop",
        size=config.vision.image_size,
        rows=config.vision.rows_per_tile,
        mark=mark,
        **_normalisation(settings, where, CLIP_MEAN, CLIP_STD, BICUBIC),
    )


def _anyres(settings: Mapping[str, Any], where: str, config: ModelConfig, mark: str) -> ImageProcessorConfig:
    """LLaVA-1.6: LlavaNextImageProcessor, whose do_pad means the batch and changes no image; or CLIP's in the original."""
    size = settings.get("size")
    keys = {"height", "width"} if isinstance(size, dict) and size.get("height") else {"shortest_edge"}
    _check_side("size", _side(settings, "size", keys, where), config, where)
    _check_side("crop_size", _side(settings, "crop_size", {"height", "width"}, where), config, where)
    if settings.get("aspect_ratio_setting", "anyres") != "anyres":
        raise ConfigError(f"{where}: aspect_ratio_setting is {quoted(settings['aspect_ratio_setting'])}; supported: 'anyres'")
    _check_pinpoints(settings, config, where)
    return ImageProcessorConfig(
        mode="anyres",
        size=config.vision.image_size,
        rows=config.vision.rows_per_tile,
        mark=mark,
        grids=config.grids,
        newline_id=config.text.embed_rows if config.text.newline else None,
        **_normalisation(settings, where, CLIP_MEAN, CLIP_STD, BICUBIC),
    )


def _tiles(
    settings: Mapping[str, Any], where: str, config: ModelConfig, vision: TiledConfig, mark: str
) -> ImageProcessorConfig:
    """Llama-3.2-Vision: MllamaImageProcessor, which cuts by a list of grids of its own."""
    if not settings:
        raise ConfigError(f"{where} is missing; copy preprocessor_config.json from the model's page")
    only(settings, "do_pad", True, where)
    _check_side("size", _side(settings, "size", {"height", "width"}, where) or 224, config, where)
    tiles = integer(settings, "max_image_tiles", 4, where, least=1)
    if tiles != vision.tiles:
        raise ConfigError(
            f"{where}: max_image_tiles is {tiles} but the vision tower takes {vision.tiles} (vision_config.max_num_tiles); "
            "make them agree"
        )
    every = _every_grid(tiles)
    if vision.ratios != every:
        raise ConfigError(
            f"{where}: images are cut into the grids {list(every)}, whose place in this list the model takes as an input, but "
            f"vision_config.supported_aspect_ratios is {list(vision.ratios)}; expected the same list"
        )
    return ImageProcessorConfig(
        mode="tiles",
        size=vision.image_size,
        rows=vision.rows_per_tile,
        mark=mark,
        grids=config.grids,
        tiles=tiles,
        **_normalisation(settings, where, HALF, HALF, BILINEAR),
    )


def _stretch(config: ModelConfig, mark: str) -> ImageProcessorConfig:
    return ImageProcessorConfig(
        mode="stretch",
        size=config.vision.image_size,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resample=BICUBIC,
        rows=config.vision.rows_per_tile,
        mark=mark,
        alpha="drop",
    )


def _every_grid(tiles: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of at most `tiles` tiles, in the order in which MllamaImageProcessor numbers them."""
    sides = range(1, tiles + 1)
    return tuple((rows, columns) for rows in sides for columns in sides if rows * columns <= tiles)


def _image_settings(
    checkpoint: Path, config: ModelConfig, processor: Mapping[str, Any], vision_tower: Path | None
) -> tuple[Mapping[str, Any], str]:
    """Image processor settings and the file that they are from; nested ones go first, as in transformers 5."""
    nested = processor.get("image_processor")
    if isinstance(nested, dict):
        return nested, f"{checkpoint / 'processor_config.json'}, image_processor"
    folders = [checkpoint, *([vision_tower] if vision_tower else [])]
    if config.vision_tower:
        folders += [Path(config.vision_tower), checkpoint / config.vision_tower]
    for folder in folders:
        path = folder / "preprocessor_config.json"
        if path.is_file():
            return read_settings(path), str(path)
    return {}, str(checkpoint / "preprocessor_config.json")


def _side(settings: Mapping[str, Any], name: str, keys: set[str], where: str) -> int | None:
    """An edge length, written as 336 or as an object with one number under all of `keys`; None when it is not set."""
    value = settings.get(name)
    if isinstance(value, dict):
        by_key = {key: side for key, side in value.items() if side is not None}
        sides = list(by_key.values())  # compared one by one: a value may be of any type
        if not set(by_key) <= keys or not sides or any(side != sides[0] for side in sides):
            raise ConfigError(f"{where}: {name} is {quoted(value)}; expected one number under {' and '.join(sorted(keys))}")
        value = sides[0]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"{where}: {name} is {quoted(value)}; expected a positive number of pixels")
    return value


def _check_side(name: str, value: int | None, config: ModelConfig, where: str) -> None:
    side = config.vision.image_size
    if value not in (side, None):
        raise ConfigError(
            f"{where}: {name} is {value} but the vision tower takes {side} x {side} pixels (vision_config.image_size); "
            f"expected {side}"
        )


def _check_pinpoints(settings: Mapping[str, Any], config: ModelConfig, where: str) -> None:
    """The processor cuts images by its own list, the model packs their features by that of config.json."""
    pinpoints = settings.get("image_grid_pinpoints")
    side = config.vision.image_size
    expected = [[rows * side, columns * side] for rows, columns in config.grids]
    if pinpoints is not None and pinpoints != expected:
        raise ConfigError(
            f"{where}: image_grid_pinpoints is {quoted(pinpoints)} but that of config.json means "
            f"{quoted(expected)}; make them agree"
        )


def _normalisation(
    settings: Mapping[str, Any],
    where: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resample: int,
) -> dict[str, Any]:
    """The common fields of all image processors of transformers."""
    return {
        "mean": three(settings, "image_mean", mean, where),
        "std": three(settings, "image_std", std, where),
        "rescale": number(settings, "rescale_factor", 1 / 255, where, above=0),
        "resample": _resample(settings, resample, where),
    }


def _pads(settings: Mapping[str, Any], where: str) -> bool:
    """do_pad means padding to a square in LLaVA's processor alone."""
    if str(settings.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
        return bool(settings.get("do_pad"))
    only(settings, "do_pad", False, where)
    return False


def _resample(settings: Mapping[str, Any], default: int, where: str) -> int:
    value = settings.get("resample")
    if value is None:
        return default
    if value not in (0, 1, 2, 3, 4, 5) or isinstance(value, bool):
        raise ConfigError(f"{where}: resample is {quoted(value)}; expected a PIL filter number, 0 to 5")
    return int(value)


def _check_rows(checkpoint: Path, vision: ClipConfig, processor: Mapping[str, Any]) -> None:
    """The processor's own count of image tokens; old files leave out the class token, which counts as one."""
    where = str(checkpoint / "processor_config.json")
    patch = integer(processor, "patch_size", vision.patch_size, where, least=1)
    extra = integer(processor, "num_additional_image_tokens", 1, where, least=0)
    strategy = processor.get("vision_feature_select_strategy") or ("full" if vision.keep_class_token else "default")
    rows = (vision.image_size // patch) ** 2 + extra - int(strategy == "default")
    if rows != vision.rows_per_tile:
        raise ConfigError(
            f"{where}: patch_size {patch}, num_additional_image_tokens {extra} and "
            f"vision_feature_select_strategy {quoted(strategy)} "
            f"make {rows} tokens per image but the vision tower gives {vision.rows_per_tile}; correct that file"
        )
