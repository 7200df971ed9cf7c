"""How often a finished checkpoint is right on drawings that no training run has seen."""

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ...drawings import KINDS, Drawing, iou, make_drawing, parse_box, questions, questions_of_many, render
from .data import GREETINGS, HELD_OUT_SEED, NO_IMAGE_ANSWER

# Images that are not square, width by height, for models that cut an image into tiles of its own form.
FORMS = ((128, 64), (64, 128), (300, 200), (200, 300), (480, 160), (160, 480), (640, 400))


@dataclass(frozen=True)
class Case:
    """One question to a finished checkpoint: the turns before it, the images, and the right answer."""

    kind: str
    images: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]
    question: str
    answer: str


def cases(drawings: int, seed: int = HELD_OUT_SEED, *, pairs: bool = True, any_form: bool = False) -> Iterator[Case]:
    """Held-out questions: per drawing one of each kind, and a later turn; for every fourth, one without an image.

    ``pairs`` adds questions about either of two images, ``any_form`` one of any kind about a stretched image.
    """
    for index in range(drawings):
        rng = random.Random(seed + index)
        drawing = make_drawing(rng)
        images = (render(drawing, rng.choice((64, 96, 128, 224, 336, 480, 640))),)
        triples = questions(drawing, rng)
        rng.shuffle(triples)
        for kind in KINDS:
            pair = next(((q, a) for q, a, k in triples if k == kind), None)
            if pair:
                yield Case(kind, images, (), *pair)
        yield Case("later turn", images, tuple((q, a) for q, a, _ in triples[1:3]), *triples[0][:2])
        if any_form:
            yield stretched_case(drawing, random.Random(seed + index))
        if index % 4 == 0:
            other = make_drawing(rng)
            which = rng.choice(("first", "second"))
            question, answer, _ = questions_of_many((drawing, other)[which == "second"], which, rng)[0]
            if pairs:
                yield Case("two pictures", (images[0], render(other, 128)), (), question, answer)
            yield Case("no picture", (), (), rng.choice((triples[0][0], rng.choice(GREETINGS))), NO_IMAGE_ANSWER)


def stretched_case(drawing: Drawing, rng: random.Random) -> Case:
    """A question of any kind about a drawing that is stretched to another form."""
    kind = rng.choice(KINDS)
    triples = questions(drawing, rng)
    question, answer = next(((q, a) for q, a, k in triples if k == kind), triples[0][:2])
    form = rng.choice(FORMS)
    image = render(drawing, max(form)).resize(form, Image.Resampling.BICUBIC)
    return Case("not square", (image,), (), question, answer)


def messages(case: Case) -> list[dict[str, Any]]:
    """The conversation of a case as chat messages, images in the first."""
    result: list[dict[str, Any]] = []
    for question, answer in case.turns:
        result.append({"role": "user", "content": [{"type": "text", "text": question}]})
        result.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    result.append({"role": "user", "content": [{"type": "text", "text": case.question}]})
    result[0]["content"][:0] = [{"type": "image"} for _ in case.images]
    return result


def evaluate(folder: Path, held_out: Iterable[Case], batch: int = 128) -> dict[str, dict[str, float]]:
    """Share of right answers per kind, by greedy decoding with transformers in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"  # answers begin where prompts end, whatever the published setting
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # Rows of similar length and the same number of images share a batch, so that little is padding.
    ordered = sorted(held_out, key=lambda case: (len(case.images), len(case.turns), case.kind))
    scores: dict[str, list[tuple[Case, str]]] = {}
    for start in tqdm(range(0, len(ordered), batch), desc="evaluate", file=sys.stderr):
        part = ordered[start : start + batch]
        for many in {len(case.images) for case in part}:
            alike = [case for case in part if len(case.images) == many]
            for case, text in zip(alike, answers(processor, model, alike), strict=True):
                scores.setdefault(case.kind, []).append((case, text))
    return {kind: grade(texts) for kind, texts in scores.items()}


@torch.inference_mode()
def answers(processor: Any, model: Any, part: Sequence[Case]) -> list[str]:
    """The answers of the model to each case; all have equally many images."""
    prompts = [processor.apply_chat_template(messages(case), add_generation_prompt=True) for case in part]
    images = [list(case.images) for case in part] if part[0].images else None
    # Some templates write the first token themselves, and a second one would be new to the model.
    has_bos = prompts[0].startswith(processor.tokenizer.bos_token)
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt", add_special_tokens=not has_bos)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def grade(texts: Sequence[tuple[Case, str]]) -> dict[str, float]:
    """Number of cases, share word for word, and for boxes also the overlap."""
    result: dict[str, float] = {
        "cases": len(texts),
        "exact": sum(case.answer == text.strip() for case, text in texts) / len(texts),
    }
    boxes = [(parse_box(case.answer), parse_box(text)) for case, text in texts if parse_box(case.answer)]
    if boxes:
        overlaps = [iou(right, box) if right and box else 0.0 for right, box in boxes]
        result["iou"] = sum(overlaps) / len(overlaps)
        result["iou>=0.75"] = sum(overlap >= 0.75 for overlap in overlaps) / len(overlaps)
    return result


def report(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a Markdown table."""
    lines = ["| kind | cases | word for word | IoU >= 0.75 | mean IoU |", "|---|---:|---:|---:|---:|"]
    for kind, score in scores.items():
        good, mean = (f"{100 * score['iou>=0.75']:.1f} %", f"{score['iou']:.3f}") if kind == "box" else ("", "")
        lines.append(f"| {kind} | {score['cases']:.0f} | {100 * score['exact']:.1f} % | {good} | {mean} |")
    return "\n".join(lines)
