"""Compiled Llama-3.2-Vision against transformers, number by number: logits of every generated token, and the tokens."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoProcessor, MllamaForConditionalGeneration

from staticvl import runtime
from staticvl.compiler.build import build
from staticvl.compiler.plan import Buckets, Options

from .checkpoints_mllama import RATIOS, TinyMllama, tiny_mllama
from .parity import Answer, Case, Size, as_answer, check, forced, generated, image_files, noise_image, opened, ours

BUCKETS = Buckets(prefill=(8, 32), decode=(4,), images=(1, 3), context=384, slots=4)
FEW_BUCKETS = Buckets(prefill=(16,), decode=(1,), images=(3,), context=320, slots=1)
# One image for each grid of tiles, in the order of their ids, and odd ones.
GRID_SIZES: tuple[Size, ...] = ((28, 28), (56, 20), (84, 28), (2000, 300), (20, 56), (640, 480), (28, 84), (10, 300))
ODD_SIZES: tuple[Size, ...] = ((1, 1), (2000, 900), (97, 61), (31, 500), (113, 113))
Inputs = Callable[[Case], dict[str, torch.Tensor]]
TextBeforeImage = Literal["transformers", "meta"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyMllama, runtime.Model]:
    return compiled(tmp_path_factory.mktemp("mllama"))


def compiled(
    folder: Path, buckets: Buckets = BUCKETS, before: TextBeforeImage = "transformers", **settings: Any
) -> tuple[TinyMllama, runtime.Model]:
    tiny = tiny_mllama(folder / "checkpoint", **settings)
    return tiny, artifact(tiny, folder / "artifact", buckets, before)


def artifact(
    tiny: TinyMllama, out: Path, buckets: Buckets = BUCKETS, before: TextBeforeImage = "transformers"
) -> runtime.Model:
    build(Options(checkpoint=tiny.folder, out=out, buckets=buckets, text_before_image=before))
    return runtime.load(out)


def hf_inputs(folder: Path) -> Inputs:
    """Ids, tiles and masks as the checkpoint's own processor makes them; BOS is not doubled."""
    processor = AutoProcessor.from_pretrained(folder)

    def inputs(case: Case) -> dict[str, torch.Tensor]:
        settings: dict[str, Any] = {"text": case.prompt, "return_tensors": "pt", "add_special_tokens": False}
        return dict(processor(images=case.images or None, **settings))

    return inputs


def question_case(prompt: str, *sizes: Size, seed: int = 0) -> Case:
    """A prompt where every "@" stands for an image; `sizes` are theirs."""
    images = [noise_image(size, seed + i) for i, size in enumerate(sizes)]
    assert prompt.count("@") == len(sizes)
    return Case(prompt.replace("@", "<|image|>"), images, f"{prompt!r} with {sizes}")


PLACES = (
    question_case("@What is in the picture?", (2000, 900)),
    question_case("<|begin_of_text|>@What is in the picture?", (56, 20)),
    question_case("Here is a red circle: @", (84, 28)),
    question_case("Look at this: @ and say what it is, in English.", (640, 480)),
    question_case("@@Which of the two is larger?", (28, 28), (2000, 900), seed=1),
    question_case("First @ then @ and what changed?", (20, 56), (10, 300), seed=2),
    question_case("Two @@ and one more @ behind.", (97, 61), (28, 28), (500, 31), seed=3),
    question_case("@ in front, then @@", (1, 1), (56, 56), (28, 84), seed=4),
    question_case("How many shapes are there? " * 6 + "@ and " * 3 + "is that all?", (31, 500), (60, 60), (113, 20), seed=5),
)


# --- transformers mode -------------------------------------------------------------------------------------------------


def test_every_grid_equals_transformers(pair: tuple[TinyMllama, runtime.Model]) -> None:
    tiny, model = pair
    inputs, seen = hf_inputs(tiny.folder), []
    for seed, size in enumerate((*GRID_SIZES, *ODD_SIZES)):
        case = question_case("@What colour is the circle?", size, seed=seed)
        given = inputs(case)
        seen.append(int(given["aspect_ratio_ids"][0, 0]))
        check(ours(model, case, new_tokens=16), generated(tiny.model, given, new_tokens=16), case.name)
    assert seen[: len(RATIOS)] == list(range(1, len(RATIOS) + 1)), "one image for each id"


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.name)
def test_text_and_images_in_any_order_equal_transformers(pair: tuple[TinyMllama, runtime.Model], case: Case) -> None:
    tiny, model = pair
    check(ours(model, case), generated(tiny.model, hf_inputs(tiny.folder)(case)), case.name)


@pytest.mark.parametrize("prompt", ["Hello!", "", "<|begin_of_text|>How many shapes are there? " * 9])
def test_text_alone_equals_transformers(pair: tuple[TinyMllama, runtime.Model], prompt: str) -> None:
    tiny, model = pair
    check(ours(model, Case(prompt, [])), generated(tiny.model, hf_inputs(tiny.folder)(Case(prompt, []))), prompt)


def test_every_kind_of_file_equals_transformers(pair: tuple[TinyMllama, runtime.Model], tmp_path: Path) -> None:
    """The processor gets the file as transformers' loader turns it, and converts to RGB itself."""
    tiny, model = pair
    inputs = hf_inputs(tiny.folder)
    for name, path in image_files(tmp_path).items():
        prompt = "<|image|>What is in the picture?"
        found = ours(model, Case(prompt, [path]), new_tokens=8)
        check(found, generated(tiny.model, inputs(Case(prompt, [opened(path)])), new_tokens=8), name)


def test_chat_template_equals_transformers(pair: tuple[TinyMllama, runtime.Model]) -> None:
    tiny, model = pair
    processor = AutoProcessor.from_pretrained(tiny.folder)
    image = noise_image((77, 40))
    for images in ([], [image]):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "Where is it?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        expected = generated(tiny.model, hf_inputs(tiny.folder)(Case(text, images)), new_tokens=8)
        out = model.generate("Where is it?", images, max_new_tokens=8, temperature=0.0, ignore_eos=True, return_logits=True)
        check(out, expected, f"{len(images)} images")


@pytest.mark.parametrize(
    "settings",
    [
        {
            "cross_layers": (0, 1, 4), "tokenizer": "tiktoken", "base": True, "image_size": 21, "heads": 2, "kv_heads": 1,
            "global_layers": 1, "taps": (1,), "names": "new",
        },
        pytest.param({"cross_layers": (0, 2), "names": "saved", "sharded": True, "kv_heads": 4}, marks=pytest.mark.slow),
        pytest.param({"cross_layers": (3, 4), "fmt": "bin", "vision_heads": 4}, marks=pytest.mark.slow),
    ],
    ids=["first and last, base", "first", "last"],
)  # fmt: skip
def test_other_models_equal_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Cross layers first or last, other spellings, and the tokenizer's other form.

    transformers counts the tokens in its cache by layer 0, which here may be a cross layer: so it runs without a cache.
    """
    tiny, model = compiled(tmp_path, FEW_BUCKETS, **settings)
    if "tokenizer" in settings:  # transformers reads only the other form
        same: dict[str, Any] = {**settings, "tokenizer": "json"}
        tiny_mllama(tmp_path / "same", **same)
    inputs = hf_inputs(tmp_path / "same" if "tokenizer" in settings else tiny.folder)
    for case in (PLACES[0], PLACES[3], PLACES[6], Case("Hello!", [])):
        found = ours(model, case)
        check(found, forced(tiny.model, inputs(case), found.token_ids), case.name)


def test_scaled_rotary_frequencies_matter(pair: tuple[TinyMllama, runtime.Model], tmp_path: Path) -> None:
    """So that the comparisons above would see it if the scaling were wrong."""
    tiny, model = pair
    other = tiny_mllama(tmp_path / "checkpoint", original_context=100_000)
    case = PLACES[3]
    found = ours(model, case, new_tokens=2)
    with pytest.raises(AssertionError):
        check(found, generated(other.model, hf_inputs(tiny.folder)(case), new_tokens=2), case.name)


# --- Text before an image ---------------------------------------------------------------------------------------------


@contextmanager
def blind_before_images(model: MllamaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """transformers' model with Meta's rule: a row that sees no tile gets nothing from cross-attention.

    transformers itself zeroes only the MLP of such a row.
    """
    sees = inputs["cross_attention_mask"].flatten(2).any(dim=2)  # [1, L]

    def zero(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        attended = output[0].clone()
        if attended.shape[1] > 1:  # the prompt, with the answer or without
            attended[:, : sees.shape[1]] *= sees[:, :, None]
        return attended, output[1]

    hooks = [module.register_forward_hook(zero) for name, module in model.named_modules() if name.endswith(".cross_attn")]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_meta_mode_equals_transformers_without_attention_of_blind_rows(
    pair: tuple[TinyMllama, runtime.Model], tmp_path: Path
) -> None:
    """Compiled behind each other into one folder: the modes share every graph."""
    tiny, other = pair
    shutil.copytree(other.artifact.folder, tmp_path / "artifact")
    model = artifact(tiny, tmp_path / "artifact", before="meta")
    inputs = hf_inputs(tiny.folder)
    for case in PLACES:
        given = inputs(case)
        with blind_before_images(tiny.model, given):
            expected = generated(tiny.model, given)
        check(ours(model, case), expected, case.name)
        blind = not given["cross_attention_mask"].flatten(2).any(dim=2).all()
        differs = ours(other, case, new_tokens=1).logits - expected.logits[:1]
        assert (abs(differs).max() > 1e-2) == blind, "the modes differ where text stands before a picture, and only there"


# --- Buckets and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefill,images,context",
    [
        ((5, 16), (4,), 202),
        pytest.param((256,), (3,), 300, marks=pytest.mark.slow),
        pytest.param((7,), (1, 2, 3), 201, marks=pytest.mark.slow),
        pytest.param((1, 64), (3,), 220, marks=pytest.mark.slow),
    ],
)
def test_buckets_do_not_matter(
    pair: tuple[TinyMllama, runtime.Model], tmp_path: Path, prefill: tuple[int, ...], images: tuple[int, ...], context: int
) -> None:
    """Prompts in one chunk and in many, and graphs that see more images than there are."""
    buckets = Buckets(prefill=prefill, decode=(1,), images=images, context=context, slots=1)
    inputs = hf_inputs(pair[0].folder)
    for before in ("transformers", "meta"):
        model = artifact(pair[0], tmp_path / "artifact", buckets, before)
        for case in (PLACES[4], PLACES[6], PLACES[8], PLACES[2], Case("Hello!", [])):
            found = ours(model, case, new_tokens=12)
            check(found, forced_in_mode(pair[0].model, inputs(case), found.token_ids, before), f"{before}: {case.name}")


def forced_in_mode(model: Any, given: dict[str, torch.Tensor], tokens: list[int], before: TextBeforeImage) -> Answer:
    if before == "transformers" or "cross_attention_mask" not in given:
        return forced(model, given, tokens)
    with blind_before_images(model, given):
        return forced(model, given, tokens)


def test_a_batch_equals_its_parts(pair: tuple[TinyMllama, runtime.Model]) -> None:
    """Prompts with no, one and several images decode in the same batch; each leaves as it would alone."""
    _, model = pair
    cases = [PLACES[6], Case("Hello!", []), PLACES[0], PLACES[5], Case("How many shapes are there?", []), PLACES[8], PLACES[3]]
    together = model.generate(
        [case.prompt for case in cases], [case.images for case in cases], raw=True, max_new_tokens=24, temperature=0.0,
        ignore_eos=True, return_logits=True,
    )  # fmt: skip
    for case, found in zip(cases, together, strict=True):
        check(found, as_answer(ours(model, case, new_tokens=24)), case.name)


def test_a_image_leaves_nothing_behind(pair: tuple[TinyMllama, runtime.Model]) -> None:
    """The slot of a prompt with three images, used again with one and with none."""
    tiny, model = pair
    inputs = hf_inputs(tiny.folder)
    for case in (PLACES[6], Case("Hello!", []), PLACES[3], PLACES[8], PLACES[0]):
        check(ours(model, case, new_tokens=6), generated(tiny.model, inputs(case), new_tokens=6), case.name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_models_equal_transformers(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    layers, vision_layers = rng.randint(2, 6), rng.randint(1, 4)
    heads = 2 ** rng.randint(0, 3)
    settings: dict[str, Any] = {
        "layers": layers, "heads": heads, "kv_heads": 2 ** rng.randint(0, heads.bit_length() - 1), "hidden": 64,
        "intermediate": rng.randint(20, 90), "vision_layers": vision_layers, "global_layers": rng.randint(1, 3),
        "image_size": rng.choice((14, 21, 35, 42)), "names": rng.choice(("old", "new", "saved")), "sharded": bool(seed % 2),
        "cross_layers": tuple(sorted(rng.sample(range(layers), rng.randint(1, layers - 1)))),
        "taps": tuple(sorted(rng.sample(range(vision_layers), rng.randint(1, vision_layers)))),
        "original_context": rng.choice((16, 64, 256)),
    }  # fmt: skip
    before: TextBeforeImage = "meta" if seed % 4 == 3 else "transformers"
    buckets = Buckets(prefill=(16, 64), decode=(1, 2, 4), images=(1, 4), context=512, slots=4)
    tiny, model = compiled(tmp_path, buckets, before, seed=seed, **settings)
    inputs = hf_inputs(tiny.folder)
    for i in range(20):
        sizes = [(rng.randint(1, 300), rng.randint(1, 300)) for _ in range(rng.randint(0, 4))]
        words = rng.choices("What colour is the red circle in the second picture ?".split(), k=rng.randint(0, 30))
        for _ in sizes:
            words.insert(rng.randint(0, len(words)), "@")
        case = question_case(" ".join(words), *sizes, seed=i)
        found = ours(model, case)
        check(found, forced_in_mode(tiny.model, inputs(case), found.token_ids, before), f"{settings} {case.name}")
