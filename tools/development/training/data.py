"""Endless training batches of drawings, questions and answers."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...drawings import Drawing, make_drawing, questions, questions_of_many
from .family import Family, Schedule
from .packing import Ask, Batch, Packer, Pictures, collate

# Training drawings come from seeds below this one, held-out drawings from seeds at or above it.
HELD_OUT_SEED = 1_000_000
NO_PICTURE = "Please show me a picture."
GREETINGS = ("Hello!", "Hello.", "Hi!", "Hi, who are you?", "Good morning!", "What can you do?", "Who are you?")


class Data:
    """Training batches for one family, all from one random number generator."""

    def __init__(self, family: Family, packer: Packer, seed: int) -> None:
        if not 0 <= seed < HELD_OUT_SEED:
            raise ValueError(f"training seeds lie between 0 and {HELD_OUT_SEED - 1}")
        self.family, self.packer = family, packer
        self.rng = random.Random(seed)

    def drawing(self, most: int = 4) -> Drawing:
        """A random drawing of at most ``most`` shapes."""
        return make_drawing(self.rng, None if most >= 4 else self.rng.randint(1, most))

    def pictures(self, drawings: Sequence[Drawing]) -> Pictures:
        """Prepared pictures of drawings."""
        return self.family.prepare([self.family.picture(drawing, self.rng) for drawing in drawings])

    def scenes(self, count: int, most: int) -> tuple[list[Drawing], Pictures]:
        """``count`` drawings of at most ``most`` shapes and their pictures."""
        drawings = [self.drawing(most) for _ in range(count)]
        return drawings, self.pictures(drawings)

    def one_picture(self, schedule: Schedule, most: int) -> Batch:
        """Rows about one picture of at most ``most`` shapes; one in four is a conversation, the others branches."""
        drawings = [self.drawing(most) for _ in range(schedule.batch)]
        chosen = []
        for drawing in drawings:
            asked = self.selection(drawing, schedule.drill)
            chosen.append((asked, self.packer.conversation if self.rng.random() < 1 / 4 else self.packer.branches))
        pictures = self.pictures(drawings)
        packed = [pack(asked, [tokens], schedule.budget) for (asked, pack), tokens in zip(chosen, pictures.tokens, strict=True)]
        rows_of = [(drawing,) for drawing in drawings]
        return replace(collate(packed, self.packer), pictures=pictures, drawings=rows_of)

    def selection(self, drawing: Drawing, drill: Sequence[str]) -> list[Ask]:
        """Questions and answers in random order, those that need most practice favoured.

        The kinds to ``drill`` mostly come first, as descriptions would rarely find room later; boxes are long and
        soon learned; and most counts have the answer "no", which one example teaches as well as four.
        """
        asked = questions(drawing, self.rng)
        self.rng.shuffle(asked)
        if self.rng.random() < 2 / 3:
            asked.sort(key=lambda entry: entry[2] not in drill)
        room = {"box": 2, "count": 3, "none": 1}
        chosen = []
        for question, answer, kind in asked:
            limited = "none" if " no " in answer else kind
            room[limited] = room.get(limited, len(asked)) - 1
            if room[limited] >= 0:
                chosen.append(Ask(question, answer, subjects(drawing, question, answer, kind)))
        return chosen

    def two_pictures(self, rows: int, budget: int) -> Batch:
        """Rows about two pictures each."""
        pairs = [(self.drawing(), self.drawing()) for _ in range(rows)]
        images, chosen = [], []
        for pair in pairs:
            images.extend(self.family.picture(drawing, self.rng) for drawing in pair)
            asks, first = [], 0
            for which, drawing in zip(("first", "second"), pair, strict=True):
                for entry in questions_of_many(drawing, which, self.rng):
                    asks.append(Ask(*entry[:2], subjects(drawing, *entry, first=first)))
                first += len(drawing.shapes)
            self.rng.shuffle(asks)
            chosen.append(asks)
        pictures = self.family.prepare(images)
        tokens = zip(pictures.tokens[::2], pictures.tokens[1::2], strict=True)
        packed = [self.packer.branches(asks, both, budget) for asks, both in zip(chosen, tokens, strict=True)]
        return replace(collate(packed, self.packer), pictures=pictures, drawings=pairs)

    def no_picture(self, rows: int) -> Batch:
        """Rows without a picture: whatever is said, the answer asks for one."""
        said: list[str] = list(GREETINGS)
        while len(said) < rows:
            said.extend(question for question, _, _ in questions(self.drawing(), self.rng))
        said = self.rng.sample(said, rows)
        return collate([self.packer.branches([Ask(text, NO_PICTURE)], [], 0) for text in said], self.packer)


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
        asked = questions(drawing, rng) + questions_of_many(drawing, rng.choice(("first", "second")), rng)
        for question, answer, _ in asked:
            yield question, answer
    for greeting in GREETINGS * 20:
        yield greeting, NO_PICTURE
