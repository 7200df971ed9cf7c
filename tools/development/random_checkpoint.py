"""Write a checkpoint with random weights, of the sizes that a config.json gives or of a model known by name.

The files are laid out as the published ones, so that compilation, memory and speed can be measured at full size without
the real weights. Answers are noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...model_defs.config import (
    QUANTISATION_KEYS,
    ClipConfig,
    ConfigError,
    ModelConfig,
    TiledConfig,
    read_config,
    read_json,
)
from ...runtime.files import write_atomically
from ...runtime.shown import shown
from ...weights.packing.settings import SETTINGS_FILES
from ...weights.tensors import TOWER, StoredTensor, WeightsError
from ...weights.weight_map import source_names
from ...weights.writer import check_space, lay_out, one_thread, write_weight_file
from ..command_errors import Parser
from ..known_models import MODELS, write_known_model
from ..random_tokenizers import write_tokenizer

DTYPES = ("float16", "bfloat16", "float32")
TOWER_FOLDER = "vision_tower"
EXAMPLES = """examples:
  python -m staticvl.tools.development.random_checkpoint llava-1.5-7b-hf --out /tmp/random-7b
  python -m staticvl.tools.development.random_checkpoint llava-v1.6-vicuna-13b-hf --out /tmp/random-13b --dtype bfloat16 \\
      --shard-gb 10
  python -m staticvl.tools.development.random_checkpoint Llama-3.2-11B-Vision --out /tmp/short \\
      --set text_config.num_hidden_layers=8 --set text_config.cross_attention_layers=[3]
"""
_CHUNK = 1 << 18  # elements drawn at once
_NORM = re.compile(r".*norm.*\.weight|.*\.ln_\w+\.weight")
_GATE = re.compile(r".*(?:\.gate|_gate|\.gate_attn|\.gate_ffn)")
_COPIED = ("*.json", "tokenizer.model", "*.tiktoken", "*.jinja")


class RandomCheckpointError(ValueError):
    """A checkpoint that cannot be written; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    try:
        tensors, bytes_total = write_checkpoint(
            args.config_folder,
            args.out,
            dtype=args.dtype,
            seed=args.seed,
            shard_gb=args.shard_gb,
            scale=args.scale,
            overrides=dict(args.set),
        )
    except (ConfigError, WeightsError, RandomCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {tensors} tensors, {bytes_total / 1e9:.2f} GB, seed {args.seed}")
    if not any((args.out / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")):
        print(f"{args.config_folder} has no tokenizer.json or tokenizer.model, which compiling needs; add one to {args.out}")
    if (args.out / TOWER_FOLDER).is_dir():
        print(f"the vision tower has a folder of its own; compile with --vision-tower {args.out / TOWER_FOLDER}")
    return 0


def write_checkpoint(
    config_folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    seed: int = 0,
    shard_gb: float = 5,
    scale: float = 0.02,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """Write random weights and copies of the JSON and tokenizer files of `config_folder` into `out`.

    `config_folder` may be a name of known_models.MODELS instead; `overrides` change values of its config.json, by key or,
    within a section, SECTION.KEY. Missing tokenizer files are generated. `dtype` is by default the one that
    config.json names, else float16. Weights are normal with standard deviation `scale`, norm weights the same around 1,
    and gates around 0.5. Returns the number of tensors and their bytes. Raises RandomCheckpointError for a config that is
    not supported and when `out` is in use, and WeightsError when there is no room.
    """
    with tempfile.TemporaryDirectory() as name:
        settings = Path(name)
        config = _stage(config_folder, overrides or {}, settings)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RandomCheckpointError(
                f"{out} exists and is not empty; choose another --out, or delete it if it is not needed"
            )
        out.mkdir(parents=True, exist_ok=True)
        dtype = dtype or _named_dtype(settings)
        tensors = {name: StoredTensor(dtype, shape) for name, shape in source_names(config).items()}
        total = sum(t.nbytes for t in tensors.values())
        check_space(out, total)
        _write_tensors(out, tensors, shard_gb * 1e9, partial(random_tensor, seed=seed, scale=scale))
        if (out / TOWER_FOLDER).is_dir():
            assert isinstance(config.vision, ClipConfig)
            _write_tower_config(out / TOWER_FOLDER, config.vision)
        _copy_files(settings, out)
    return len(tensors), total


def _stage(config_folder: Path, overrides: Mapping[str, Any], folder: Path) -> ModelConfig:
    """Put all files but weights into `folder`, so that their errors are known before `out` is written."""
    if not config_folder.is_dir() and str(config_folder) in MODELS:
        write_known_model(str(config_folder), folder)
    elif config_folder.is_dir():
        _copy_files(config_folder, folder)
    else:
        raise RandomCheckpointError(
            f"{shown(config_folder)} is not a folder; expected one with config.json, or {', '.join(MODELS)}"
        )
    if overrides and (folder / "config.json").is_file():
        data = read_json(folder / "config.json")
        for key, value in overrides.items():
            _override(data, key, value)
        _write_json(folder / "config.json", data)
    try:
        config = read_config(folder, vision_tower=_tower_beside(config_folder, folder))
        _forget_quantisation(folder)
        write_tokenizer(config, folder)
    except ConfigError as error:
        raise RandomCheckpointError(str(error).replace(str(folder), str(config_folder))) from error
    if isinstance(config.vision, TiledConfig) and not (folder / "preprocessor_config.json").is_file():
        _write_json(folder / "preprocessor_config.json", _tiled_images(config.vision))
    return config


def _tower_beside(config_folder: Path, folder: Path) -> Path | None:
    """The vision tower that a config names by a path relative to its own folder."""
    path = folder / "config.json"
    name = read_json(path).get("mm_vision_tower") if path.is_file() else None
    return config_folder / name if name and (config_folder / name / "config.json").is_file() else None


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise RandomCheckpointError(f"--set {key}: {section} of config.json is not a section; give KEY or SECTION.KEY")
    data[last] = value


def _named_dtype(settings: Path) -> str:
    """The dtype that config.json gives for the checkpoint or for its text model."""
    data = read_json(settings / "config.json")
    sections = [data, data.get("text_config") or {}]
    names = [str(section[key]) for section in sections for key in ("torch_dtype", "dtype") if section.get(key)]
    return next((name for name in names if name in DTYPES), "float16")


def _write_tensors(
    out: Path, tensors: Mapping[str, StoredTensor], limit: float, draw: Callable[[str, StoredTensor], Tensor]
) -> None:
    """The checkpoint's weights, and in a folder of its own the vision tower where the layout has it apart."""
    inside = {name: t for name, t in tensors.items() if not name.startswith(TOWER)}
    apart = {name.removeprefix(TOWER): t for name, t in tensors.items() if name.startswith(TOWER)}
    total = sum(t.nbytes for t in tensors.values())
    with one_thread(), tqdm(total=total, unit="B", unit_scale=True, desc="random weights", disable=None) as bar:
        _write_weights(out, inside, limit, draw, bar.update)
        if apart:
            _write_weights(out / TOWER_FOLDER, apart, math.inf, draw, bar.update)


def _write_weights(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    limit: float,
    draw: Callable[[str, StoredTensor], Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write one folder's weights in files of up to `limit` bytes, with an index when there are several."""
    parts = list(_split(tensors, limit))
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        write_weight_file(folder, lay_out(file, part), lambda name: draw(name, tensors[name]), progress)
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def random_tensor(name: str, stored: StoredTensor, seed: int, scale: float) -> Tensor:
    """The random tensor `name`; its values depend on name, shape, seed and scale alone, so not on sharding or order."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    centre = 1.0 if _NORM.fullmatch(name) else 0.5 if _GATE.fullmatch(name) else 0.0
    tensor = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for piece in tensor.view(-1).split(_CHUNK):
        piece.copy_(torch.empty(piece.shape, dtype=torch.float32).normal_(centre, scale, generator=generator))
    return tensor


def _split(tensors: Mapping[str, StoredTensor], limit: float) -> Iterator[dict[str, StoredTensor]]:
    part: dict[str, StoredTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _copy_files(source: Path, out: Path) -> None:
    """Every JSON and tokenizer file but weight indexes; config.json last: an interrupted folder must not look complete."""
    files = [p for pattern in _COPIED for p in sorted(source.glob(pattern))]
    for path in sorted(files, key=lambda p: p.name == "config.json"):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)


def _forget_quantisation(folder: Path) -> None:
    """Remove settings of a quantisation: random weights are in floating point."""
    for name in SETTINGS_FILES:
        (folder / name).unlink(missing_ok=True)
    data = read_json(folder / "config.json")
    if keys := data.keys() & set(QUANTISATION_KEYS):
        _write_json(folder / "config.json", {key: value for key, value in data.items() if key not in keys})


def _tiled_images(vision: TiledConfig) -> dict[str, object]:
    """The published settings of Llama-3.2-Vision."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": vision.tiles,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": vision.image_size, "width": vision.image_size},
    }


def _write_tower_config(folder: Path, vision: ClipConfig) -> None:
    sizes = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": vision.activation,
    }
    _write_json(folder / "config.json", {"model_type": "clip", "vision_config": sizes})
    # The settings that every CLIP of OpenAI has.
    images = {
        "crop_size": vision.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": vision.image_size,
    }
    _write_json(folder / "preprocessor_config.json", images)


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m staticvl.tools.development.random_checkpoint",
        description="Write a checkpoint with random weights, of the sizes that CONFIG_FOLDER/config.json gives.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    note = " (default: %(default)s)"
    parser.add_argument(
        "config_folder",
        metavar="CONFIG_FOLDER",
        type=Path,
        help=f"folder with config.json; its JSON and tokenizer files are copied. Or one of {', '.join(MODELS)}",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new or empty folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: that of config.json)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="same seed, same weights" + note)
    parser.add_argument("--shard-gb", metavar="N", type=_positive, default=5.0, help="largest weight file, in GB" + note)
    parser.add_argument("--scale", metavar="X", type=_positive, default=0.02, help="standard deviation of the weights" + note)
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=_assignment,
        action="append",
        default=[],
        help="change a value of config.json, such as text_config.num_hidden_layers=4; may be given several times",
    )
    return parser.parse_args(argv)


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
