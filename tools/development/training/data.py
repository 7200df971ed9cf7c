"""Endless training batches of drawings, questions and answers."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...drawings import Drawing, make_drawing, questions, questions_of_many
from .family import Family, Schedule
from .packing import Batch, Example, ImageBatch, Packer, collate

# Training drawings come from seeds below this one, held-out drawings from seeds at or above it.
HELD_OUT_SEED = 1_000_000
NO_IMAGE_ANSWER = "Please show me a picture."
GREETINGS = ("Hello!", "Hello.", "Hi!", "Hi, who are you?", "Good morning!", "What can you do?", "Who are you?")


class TrainingData:
    """Training batches for one family, all from one random number generator."""

    def __init__(self, family: Family, packer: Packer, seed: int) -> None:
        if not 0 <= seed < HELD_OUT_SEED:
            raise ValueError(f"training seeds lie between 0 and {HELD_OUT_SEED - 1}")
        self.family, self.packer = family, packer
        self.rng = random.Random(seed)

    def drawing(self, most: int = 4) -> Drawing:
        """A random drawing of at most ``most`` shapes."""
        return make_drawing(self.rng, None if most >= 4 else self.rng.randint(1, most))

    def images(self, drawings: Sequence[Drawing]) -> ImageBatch:
        """Prepared images of drawings."""
        return self.family.prepare([self.family.training_image(drawing, self.rng) for drawing in drawings])

    def scenes(self, count: int, most: int) -> tuple[list[Drawing], ImageBatch]:
        """``count`` drawings of at most ``most`` shapes and their images."""
        drawings = [self.drawing(most) for _ in range(count)]
        return drawings, self.images(drawings)

    def one_image(self, schedule: Schedule, most: int) -> Batch:
        """Rows about one image of at most ``most`` shapes; one in four is a conversation, the others branches."""
        drawings = [self.drawing(most) for _ in range(schedule.batch)]
        rows = []
        for drawing in drawings:
            examples = self.selection(drawing, schedule.drill)
            rows.append((examples, self.packer.conversation if self.rng.random() < 1 / 4 else self.packer.branches))
        images = self.images(drawings)
        packed = [
            pack(examples, [tokens], schedule.budget) for (examples, pack), tokens in zip(rows, images.tokens, strict=True)
        ]
        rows_of = [(drawing,) for drawing in drawings]
        return replace(collate(packed, self.packer), images=images, drawings=rows_of)

    def selection(self, drawing: Drawing, drill: Sequence[str]) -> list[Example]:
        """Questions and answers in random order, those that need most practice favoured.

        The kinds to ``drill`` mostly come first, as descriptions would rarely find room later; boxes are long and
        soon learned; and most counts have the answer "no", which one example teaches as well as four.
        """
        triples = questions(drawing, self.rng)
        self.rng.shuffle(triples)
        if self.rng.random() < 2 / 3:
            triples.sort(key=lambda entry: entry[2] not in drill)
        room = {"box": 2, "count": 3, "none": 1}
        examples = []
        for question, answer, kind in triples:
            limited = "none" if " no " in answer else kind
            room[limited] = room.get(limited, len(triples)) - 1
            if room[limited] >= 0:
                examples.append(Example(question, answer, subjects(drawing, question, answer, kind)))
        return examples

    def two_images(self, rows: int, budget: int) -> Batch:
        """Rows about two images each."""
        pairs = [(self.drawing(), self.drawing()) for _ in range(rows)]
        renderings, rows_of_examples = [], []
        for pair in pairs:
            renderings.extend(self.family.training_image(drawing, self.rng) for drawing in pair)
            examples, first = [], 0
            for which, drawing in zip(("first", "second"), pair, strict=True):
                for entry in questions_of_many(drawing, which, self.rng):
                    examples.append(Example(*entry[:2], subjects(drawing, *entry, first=first)))
                first += len(drawing.shapes)
            self.rng.shuffle(examples)
            rows_of_examples.append(examples)
        images = self.family.prepare(renderings)
        tokens = zip(images.tokens[::2], images.tokens[1::2], strict=True)
        packed = [self.packer.branches(examples, both, budget) for examples, both in zip(rows_of_examples, tokens, strict=True)]
        return replace(collate(packed, self.packer), images=images, drawings=pairs)

    def no_image(self, rows: int) -> Batch:
        """Rows without an image: whatever the text says, the answer asks for one."""
        texts: list[str] = list(GREETINGS)
        while len(texts) < rows:
            texts.extend(question for question, _, _ in questions(self.drawing(), self.rng))
        texts = self.rng.sample(texts, rows)
        return collate([self.packer.branches([Example(text, NO_IMAGE_ANSWER)], [], 0) for text in texts], self.packer)


def subjects(drawing: Drawing, question: str, answer: str, kind: str, first: int = 0) -> tuple[int, ...]:
    """Indices, from ``first`` on, of the shapes an answer speaks of; none for a count, which looks everywhere."""
    if kind == "count":
        return ()
    if kind == "describe":
        return tuple(range(first, first + len(drawing.shapes)))
    words = set(re.findall("[a-z]+", f"{question} {answer}"))
    return tuple(index for index, shape in enumerate(drawing.shapes, first) if {shape.kind, shape.colour} <= words)


def sentences(seed: int, drawings: int = 3000) -> Iterator[tuple[str, str]]:
    """Questions and answers like those the model will read and write, for training a tokenizer."""
    rng = random.Random(seed)
    for _ in range(drawings):
        drawing = make_drawing(rng)
        triples = questions(drawing, rng) + questions_of_many(drawing, rng.choice(("first", "second")), rng)
        for question, answer, _ in triples:
            yield question, answer
    for greeting in GREETINGS * 20:
        yield greeting, NO_IMAGE_ANSWER
