"""Compiled LLaVA-1.6 against transformers, number by number: logits of every generated token, and the tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .checkpoints_llava_next import TinyNext, tiny_llava_next
from .parity import Case, Size, as_answer, check, generated, image_files, noise_image, opened, ours

BUCKETS = Buckets(prefill=(8, 48), decode=(1, 2, 4), vision=(1, 3), context=512, slots=4)
# Every grid, upright and lying images, ties between grids, images so narrow that all rows of their tiles are unpadded away.
SIZES: tuple[Size, ...] = (
    (10, 300), (300, 10), (2000, 900), (28, 28), (20, 15), (15, 20), (56, 28), (28, 57), (64, 480), (84, 29), (640, 480),
    (480, 640), (131, 130), (1450, 20), (1, 1),
)  # fmt: skip
Inputs = Callable[[Case], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyNext, runtime.Model]:
    return compiled(tmp_path_factory.mktemp("hf"))


def compiled(folder: Path, buckets: Buckets = BUCKETS, **settings: Any) -> tuple[TinyNext, runtime.Model]:
    tiny = tiny_llava_next(folder / "checkpoint", **settings)
    build(Options(checkpoint=tiny.folder, vision_tower=tiny.vision_tower, out=folder / "artifact", buckets=buckets))
    return tiny, runtime.load(folder / "artifact")


def hf_inputs(folder: Path) -> Inputs:
    """Ids and pixels as the checkpoint's own processor makes them."""
    processor = AutoProcessor.from_pretrained(folder)

    def inputs(case: Case) -> dict[str, torch.Tensor]:
        return dict(processor(images=case.images or None, text=case.prompt, return_tensors="pt"))

    return inputs


def question_case(*sizes: Size, seed: int = 0) -> Case:
    """A question about images of these sizes."""
    images = [noise_image(size, seed + i) for i, size in enumerate(sizes)]
    marks = "<image>\n" * len(sizes)
    return Case(f"USER: {marks}What colour is the {'red ' * (seed % 5)}circle? ASSISTANT:", images, f"images {sizes}")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_one_image_equals_transformers(hf: tuple[TinyNext, runtime.Model], size: Size) -> None:
    tiny, model = hf
    case = question_case(size, seed=sum(size))
    check(ours(model, case), generated(tiny.model, hf_inputs(tiny.folder)(case)), case.name)


@pytest.mark.parametrize(
    "case",
    [
        question_case(),
        question_case((10, 300), (2000, 900)),
        question_case((84, 28), (28, 28), (60, 61), seed=3),
        Case("<image>", [noise_image((40, 90))], "an image alone"),
        Case(
            "Compare <image> with <image>; which?",
            [noise_image((30, 20)), noise_image((99, 300), 1)],
            "text between and after",
        ),
    ],
    ids=["text", "two", "three", "alone", "between"],
)
def test_several_images_equal_transformers(hf: tuple[TinyNext, runtime.Model], case: Case) -> None:
    tiny, model = hf
    check(ours(model, case), generated(tiny.model, hf_inputs(tiny.folder)(case)), case.name)


def test_every_kind_of_file_equals_transformers(hf: tuple[TinyNext, runtime.Model], tmp_path: Path) -> None:
    """The processor gets the file as transformers' loader turns it, and converts to RGB itself."""
    tiny, model = hf
    inputs = hf_inputs(tiny.folder)
    for name, path in image_files(tmp_path).items():
        prompt = "USER: <image>\nWhat is in the picture? ASSISTANT:"
        found = ours(model, Case(prompt, [path]), new_tokens=8)
        check(found, generated(tiny.model, inputs(Case(prompt, [opened(path)])), new_tokens=8), name)


def test_chat_template_equals_transformers(hf: tuple[TinyNext, runtime.Model]) -> None:
    tiny, model = hf
    processor = AutoProcessor.from_pretrained(tiny.folder)
    content = [{"type": "image"}, {"type": "text", "text": "Where is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = noise_image((77, 40))
    expected = generated(tiny.model, dict(processor(images=[image], text=text, return_tensors="pt")), new_tokens=8)
    out = model.generate("Where is it?", image, max_new_tokens=8, temperature=0.0, ignore_eos=True, return_logits=True)
    check(out, expected, "one turn")


# --- Original layout ---------------------------------------------------------------------------------------------------


def original_inputs(tiny: TinyNext) -> Inputs:
    """The original code's rules: pairs are (width, height), and every piece of text between images is a text of its own.

    transformers' processor cuts the images, with the pairs turned round; the model itself says how many rows each gives.
    """
    reference: Any = tiny.model
    pinpoints, side = reference.config.image_grid_pinpoints, reference.config.vision_config.image_size
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )
    words = sentencepiece.SentencePieceProcessor(model_file=str(tiny.folder / "tokenizer.model"))

    def inputs(case: Case) -> dict[str, torch.Tensor]:
        first, *others = case.prompt.split("<image>")
        ids, seen = [1, *words.encode(first)], {}
        if case.images:
            seen = dict(processor(case.images, return_tensors="pt"))
            with torch.no_grad():
                features = reference.model.get_image_features(**seen, return_dict=True).pooler_output
            for rows, piece in zip(features, others, strict=True):
                ids += [tiny.image_token_id] * len(rows) + words.encode(piece)
        tokens = torch.tensor([ids])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **seen}

    return inputs


@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_original_layout_equals_its_rules(tmp_path: Path, fmt: str) -> None:
    """The folder given as the vision tower holds other weights: the tower inside the checkpoint is the one to use."""
    tiny, model = compiled(tmp_path, layout="original", fmt=fmt, sharded=True)
    inputs = original_inputs(tiny)
    cases = [question_case(size, seed=i) for i, size in enumerate(((20, 15), (28, 28), (10, 300), (640, 480)))]
    cases += [question_case(), question_case((300, 20), (15, 20), seed=9)]
    for case in cases:
        check(ours(model, case, new_tokens=16), generated(tiny.model, inputs(case), new_tokens=16), case.name)


def test_ties_differ_between_the_layouts(hf: tuple[TinyNext, runtime.Model], tmp_path: Path) -> None:
    """An image that fits one row of two tiles as well as two rows of one: the first of the list, read either way."""
    _, other = compiled(tmp_path, layout="original")
    image = noise_image((20, 15))
    counts = [model.generate("<image>", image, raw=True, max_new_tokens=1).image_tokens for model in (hf[1], other)]
    # 16 rows of the whole, then: 4 lines of 6 of the 8 patches and a newline; 4 of the 8 lines of 4 patches and a newline.
    assert counts == [16 + 4 * 7, 16 + 4 * 5]


# --- Buckets, batches and spellings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill,vision", [((256,), (9,)), ((7,), (1,)), ((5, 16, 64), (2, 5))], ids=str)
def test_buckets_do_not_matter(
    hf: tuple[TinyNext, runtime.Model], tmp_path: Path, prefill: tuple[int, ...], vision: tuple[int, ...]
) -> None:
    buckets = Buckets(prefill=prefill, decode=(1,), vision=vision, context=300 + len(prefill), slots=1)
    build(Options(checkpoint=hf[0].folder, out=tmp_path / "artifact", buckets=buckets))
    other = runtime.load(tmp_path / "artifact")
    for case in (question_case((2000, 900), (20, 15), seed=4), question_case((64, 480)), question_case()):
        check(ours(other, case, new_tokens=12), as_answer(ours(hf[1], case, new_tokens=12)), case.name)


def test_a_batch_equals_its_parts(hf: tuple[TinyNext, runtime.Model]) -> None:
    """Six prompts through four slots."""
    _, model = hf
    cases = [
        question_case((10, 300)),
        question_case(),
        question_case((28, 28), (84, 28), seed=1),
        question_case((56, 28), seed=2),
        question_case(seed=4),
        question_case((1, 1)),
    ]
    together = model.generate(
        [case.prompt for case in cases], [case.images for case in cases], raw=True, max_new_tokens=24, temperature=0.0,
        ignore_eos=True, return_logits=True,
    )  # fmt: skip
    for case, found in zip(cases, together, strict=True):
        check(found, as_answer(ours(model, case, new_tokens=24)), case.name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_models_equal_transformers(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    dims = {
        "kv_heads": kv_heads, "heads": kv_heads * rng.choice((1, 2, 4)), "hidden": 96, "head_dim": rng.choice((8, 16, 32)),
        "layers": rng.randint(1, 4), "intermediate": rng.randint(20, 90), "vocab": rng.randint(389, 500),
        "patch_size": rng.choice((4, 7, 14)), "vision_layers": rng.randint(2, 4),
    }  # fmt: skip
    grids = tuple(rng.sample([(r, c) for r in range(1, 5) for c in range(1, 5) if 1 < r * c <= 6], 5))
    names = rng.choice(("old", "new", "saved"))
    buckets = Buckets(prefill=(16, 64), decode=(1, 2, 4), vision=(1, 3), context=1024, slots=4)
    tiny, model = compiled(tmp_path, buckets, seed=seed, names=names, grids=grids, sharded=bool(seed % 2), **dims)
    inputs = hf_inputs(tiny.folder)
    for i in range(24):
        sizes = [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(rng.choice((1, 1, 1, 2)))]
        case = question_case(*sizes, seed=i)
        check(ours(model, case), generated(tiny.model, inputs(case)), f"{dims} {grids} {case.name}")
