"""What the proofs of parity share: images, transformers' own greedy answers, and the comparison with ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from staticvl import runtime

TOLERANCE = 1e-4  # of the largest magnitude
NEW_TOKENS = 64
Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True, slots=True)
class Case:
    """A raw prompt with its images."""

    prompt: str
    images: list[Any]
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Greedy tokens [n] and the logits that each was chosen from, float32 [n, V]."""

    tokens: list[int]
    logits: np.ndarray


def noise_image(size: Size, seed: int = 0) -> Image.Image:
    """Noise that is coarse enough to survive scaling, so that different images give clearly different features."""
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (min(height, 24), min(width, 24), 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def image_files(folder: Path) -> dict[str, Path]:
    """Images in every form that needs a rule of its own."""
    folder.mkdir(exist_ok=True)
    base = noise_image((90, 61), seed=7)
    faded = base.copy()
    faded.putalpha(noise_image((90, 61), seed=8).convert("L"))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be shown turned by 90 degrees
    palette = base.quantize(16)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "grey.png": (base.convert("L"), {}),
        "grey_alpha.png": (faded.convert("LA"), {}),
        "rgba.png": (faded, {}),
        "palette.png": (palette, {}),
        "palette_transparent.png": (palette, {"transparency": 3}),
        "colour_key.png": (base, {"transparency": base.getpixel((5, 5))}),
        "black_white.png": (base.convert("1"), {}),
        "turned.jpg": (base, {"exif": turned, "quality": 95}),
        "cmyk.jpg": (base.convert("CMYK"), {"quality": 95}),
        "animated.gif": (palette, {"save_all": True, "append_images": [noise_image((90, 61), seed=9).quantize(16)]}),
        "lossy.webp": (faded, {"quality": 80}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in kinds}


def opened(path: Path) -> Image.Image:
    """A file as transformers' loader opens and turns it; its conversion to RGB is left to the processor, since the loader's
    own drops transparency."""
    return ImageOps.exif_transpose(Image.open(path))


def generated(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int = NEW_TOKENS) -> Answer:
    """What transformers' own generate chooses, step by step over its own cache."""
    out = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return Answer(out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).float().numpy())


def forced(model: Any, inputs: dict[str, torch.Tensor], tokens: Sequence[int]) -> Answer:
    """The same without a cache: all of the prompt and of `tokens` in one forward pass of transformers.

    Its greedy choice at every position is what `tokens` must be, as long as all before agree.
    """
    prompt = inputs["input_ids"].shape[1]
    answer = torch.tensor([list(tokens[:-1])], dtype=torch.long)
    whole = dict(inputs) | {"input_ids": torch.cat((inputs["input_ids"], answer), dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "cross_attention_mask" in inputs:  # what the last token of the prompt sees, the answer sees
        mask = inputs["cross_attention_mask"]
        whole["cross_attention_mask"] = torch.cat((mask, mask[:, -1:].expand(-1, answer.shape[1], -1, -1)), dim=1)
    with torch.no_grad():
        logits = model(**whole, use_cache=False).logits[0, prompt - 1 :].float().numpy()
    return Answer(logits.argmax(axis=-1).tolist(), logits)


def ours(model: runtime.Model, case: Case, new_tokens: int = NEW_TOKENS) -> runtime.Output:
    return model.generate(
        case.prompt, case.images, raw=True, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True, return_logits=True
    )


def check(found: runtime.Output | Answer, expected: Answer, what: object) -> float:
    """Equal tokens, and logits within TOLERANCE; the error as a share of the largest magnitude."""
    tokens = found.tokens if isinstance(found, Answer) else found.token_ids
    differ = next((i for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=True)) if a != b), None)
    error = relative_error(found.logits, expected.logits)
    assert differ is None, f"{what}: token {differ} is {tokens[differ]}, expected {expected.tokens[differ]}; logits {error:.1e}"
    assert error <= TOLERANCE, f"{what}: logits differ by {error:.1e} of their largest magnitude"
    return error


def relative_error(found: np.ndarray | None, expected: np.ndarray) -> float:
    assert found is not None
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def as_answer(out: runtime.Output) -> Answer:
    assert out.logits is not None
    return Answer(out.token_ids, out.logits)
