"""The built-in questions to both sides, which follow from a seed."""

from __future__ import annotations

import random

from PIL import Image

from ...runtime.processor.prompt import Message
from ..drawings import make_drawing, questions, render
from ..questions.samples import Box, DataError, Sample, user_sample

__all__ = ["Box", "DataError", "Sample", "built_in_samples", "image", "user_sample"]

IMAGE_SIZE = 112  # height and width of a built-in image, in pixels
QUESTION = "What is in the picture?"
TEXTS = ("Say one word about each of these: a circle, a square, a triangle and a star.", "Name three colours.")


def image(seed: int, grid: tuple[int, int] = (1, 1), size: int = IMAGE_SIZE) -> Image.Image:
    """A drawing, repeated on a grid of (rows, columns) so that no two parts of a wide image are alike."""
    rng = random.Random(seed)
    rows, columns = grid
    canvas = Image.new("RGB", (columns * size, rows * size))
    for row in range(rows):
        for column in range(columns):
            canvas.paste(render(make_drawing(rng), size), (column * size, row * size))
    return canvas


def built_in_samples(seed: int = 0) -> list[Sample]:
    """Text alone, images of several shapes, questions whose answers are known, two images, an earlier turn."""
    rng = random.Random(seed)
    drawing = make_drawing(rng, 3)
    answers = {kind: (question, answer) for question, answer, kind in questions(drawing, rng)}
    drawn = render(drawing, IMAGE_SIZE)
    samples = [user_sample(f"text {i + 1}", text, built_in=True) for i, text in enumerate(TEXTS)]
    for kind in ("describe", "box"):
        question, answer = answers[kind]
        samples.append(user_sample(f"image, {kind}", question, (drawn,), built_in=True, answer=answer))
    for name, grid in (("wide", (1, 2)), ("tall", (3, 1)), ("large", (2, 2))):
        samples.append(user_sample(f"image, {name}", QUESTION, (image(seed + 7, grid),), built_in=True))
    samples.append(user_sample("two images", "Which of the two is larger?", (drawn, image(seed + 9)), built_in=True))
    turns = (Message("user", QUESTION, 1), Message("assistant", "A red circle."), Message("user", "Where is it?"))
    samples.append(Sample(name="second turn", messages=turns, images=(drawn,), built_in=True))
    return samples
