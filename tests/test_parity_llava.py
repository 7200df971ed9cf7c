"""The compiled model against transformers, number by number: logits of every generated token, and the tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .checkpoints import Tiny, tiny_llava
from .conftest import EMBEDDED, SMALL_BUCKETS

NEW_TOKENS = 64
TOLERANCE = 1e-4  # of the largest magnitude
SIZES = ((64, 64), (640, 480), (337, 335), (31, 500), (500, 31), (1, 1), (97, 211), (1023, 767))
WORDS = "What colour is the red circle in the second picture where are two squares how many shapes do you see ?".split()


@dataclass(frozen=True)
class Case:
    """A prompt with its images."""

    prompt: str
    images: list[Image.Image]


def make_cases(count: int, seed: int) -> list[Case]:
    """Prompts of 1 to 40 words: `count` with one or two noisy images of odd sizes, then a few without."""
    rng = random.Random(seed)
    cases = []
    for i in range(count + max(1, count // 5)):
        image_count = 0 if i >= count else 1 if i < len(SIZES) else rng.choice((1, 1, 2))
        sizes = [SIZES[(i + k) % len(SIZES)] for k in range(image_count)]
        noise = np.random.default_rng(seed + i)
        images = [Image.fromarray(noise.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]
        cases.append(Case(" ".join(rng.choices(WORDS, k=rng.randint(1, 40))), images))
    return cases


def reference(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the raw logits after each, from transformers' own generate."""
    out = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).numpy()


def compare(model: runtime.Model, case: Case, expected: tuple[list[int], np.ndarray], **options: bool) -> float:
    """Check the tokens; return the worst logit error relative to the largest magnitude."""
    out = model.generate(
        case.prompt, case.images, max_new_tokens=NEW_TOKENS, ignore_eos=True, return_logits=True, temperature=0.0, **options
    )
    tokens, logits = expected
    assert out.token_ids == tokens
    assert out.logits.dtype == np.float32
    return float(np.abs(out.logits - logits).max() / np.abs(logits).max())


def hf_inputs(folder: Path) -> Callable[[Case], dict[str, torch.Tensor]]:
    """Ids and pixels as the checkpoint's own processor makes them."""
    processor = AutoProcessor.from_pretrained(folder)

    def inputs(case: Case) -> dict[str, torch.Tensor]:
        content = [*({"type": "image"} for _ in case.images), {"type": "text", "text": case.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(processor(images=case.images or None, text=text, return_tensors="pt"))

    return inputs


def check_hf(folder: Path, reference_model: LlavaForConditionalGeneration, artifact: Path, cases: list[Case]) -> float:
    model, inputs = runtime.load(artifact), hf_inputs(folder)
    worst = max(compare(model, case, reference(reference_model, inputs(case))) for case in cases)
    assert worst <= TOLERANCE
    return worst


def test_trained_model_equals_transformers(embedded_artifact: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    check_hf(EMBEDDED, model, embedded_artifact, make_cases(20, seed=1))


@pytest.mark.parametrize(
    "dims",
    [
        pytest.param({}, id="gqa"),
        pytest.param({"heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 96, "vocab": 1021}, id="odd-vocabulary"),
        pytest.param(
            {"heads": 4, "kv_heads": 1, "layers": 3, "intermediate": 70, "image_size": 42, "vision_layers": 4},
            id="multi-query",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"heads": 2, "kv_heads": 2, "head_dim": 64, "vision_hidden": 40, "vision_heads": 5},
            id="multi-head",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_random_models_equal_transformers(tmp_path: Path, dims: dict[str, int]) -> None:
    tiny = tiny_llava(tmp_path / "checkpoint", seed=3, **dims)
    build(Options(checkpoint=tiny.folder, out=tmp_path / "artifact", buckets=SMALL_BUCKETS))
    check_hf(tiny.folder, tiny.model, tmp_path / "artifact", make_cases(20 if not dims else 8, seed=2))


@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
def test_original_layout_equals_transformers(tmp_path: Path, fmt: str) -> None:
    """The reference gets the ids and pixels that the runtime prepared: both are compared on their own elsewhere."""
    tiny = tiny_llava(tmp_path / "checkpoint", layout="original", fmt=fmt, sharded=True)  # type: ignore[arg-type]
    options = Options(checkpoint=tiny.folder, vision_tower=tiny.vision_tower, out=tmp_path / "artifact", buckets=SMALL_BUCKETS)
    build(options)
    model = runtime.load(tmp_path / "artifact")
    worst = max(compare(model, case, reference(tiny.model, prepared(model, tiny, case))) for case in make_cases(6, seed=4))
    assert worst <= TOLERANCE


def prepared(model: runtime.Model, tiny: Tiny, case: Case) -> dict[str, torch.Tensor]:
    """The runtime's own prompt in transformers' form."""
    prompt = model.processor.prompt(case.prompt, case.images)
    ids = np.where(prompt.rows >= 0, tiny.image_token_id, prompt.token_ids)
    info = model.info.image
    pixels = (prompt.pixels / 255 - np.array(info.mean)) / np.array(info.std)
    inputs = {"input_ids": torch.from_numpy(ids[None]).long(), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if len(pixels):
        inputs["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()
    return inputs


def test_chunks_do_not_matter(tmp_path: Path) -> None:
    """One prompt through one large bucket, and through many small ones: the same logits."""
    tiny = tiny_llava(tmp_path / "checkpoint")
    outputs = []
    for prefill in ((256,), (7,), (5, 16)):
        out = tmp_path / "-".join(map(str, prefill))
        build(Options(checkpoint=tiny.folder, out=out, buckets=Buckets(prefill=prefill, decode=(1,), context=300, slots=1)))
        case = make_cases(12, seed=5)[11]
        outputs.append(
            runtime.load(out).generate(case.prompt, case.images, max_new_tokens=8, ignore_eos=True, return_logits=True)
        )
    for other in outputs[1:]:
        assert other.token_ids == outputs[0].token_ids
        assert np.abs(other.logits - outputs[0].logits).max() <= TOLERANCE * np.abs(outputs[0].logits).max()
