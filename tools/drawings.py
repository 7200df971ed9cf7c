"""Drawings of coloured shapes, and questions about them whose answers are known exactly.

The miniature checkpoints in ``assets/`` are trained and judged on these. Everything follows from the
``random.Random`` that is passed in, so a seed names a drawing for good.

A drawing is a square canvas of 20 by 20 grid units. Every shape fills a square box whose corners lie on the
grid, and its centre lies well inside one of nine named places, so that a box in hundredths and a place in
words are both exact and never a matter of taste.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 20
SHAPES = ("circle", "square", "triangle", "diamond", "star")
COLOURS = {
    "red": (216, 38, 38),
    "green": (36, 150, 60),
    "blue": (40, 76, 214),
    "yellow": (240, 200, 20),
    "purple": (146, 52, 176),
    "black": (24, 24, 28),
}
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four")
KINDS = ("colour", "shape", "count", "position", "box", "describe")

# Largest box side in grid units, by number of shapes: four big shapes would rarely find room.
_LARGEST = {1: 9, 2: 8, 3: 7, 4: 6}
_SMALLEST = 5
_SUPERSAMPLE = 4

# Of each kind's wordings, the first of "count" and of "describe" name the image and so can tell two apart.
_QUESTIONS = {
    "colour": ("What colour is the {0}?", "Which colour does the {0} have?", "Tell me the colour of the {0}."),
    "shape": ("What shape is {0}?", "Which shape is {0}?", "What is the {0} thing?"),
    "count": ("How many {0} are in the picture?", "How many {0} are there?", "Count the {0}."),
    "position": ("Where is the {0}?", "Where in the picture is the {0}?", "Tell me where the {0} is."),
    "box": (
        "Please provide the bounding box coordinate of the region this sentence describes: the {0}.",
        "Give the bounding box of the {0}.",
    ),
    "describe": ("What is in the picture?", "Describe the picture.", "What do you see?"),
}

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shape:
    """One shape; ``left``, ``top`` and ``size`` give its square box in grid units."""

    kind: str
    colour: str
    rgb: Colour
    left: int
    top: int
    size: int

    @property
    def name(self) -> str:
        """The words that name this shape, for example ``red circle``."""
        return f"{self.colour} {self.kind}"

    @property
    def box(self) -> Box:
        """The box (x1, y1, x2, y2) as fractions of the canvas."""
        x, y, s = self.left, self.top, self.size
        return x / GRID, y / GRID, (x + s) / GRID, (y + s) / GRID

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column, each 0 to 2, of the named place that holds the centre."""
        return _third(self.top, self.size), _third(self.left, self.size)

    @property
    def place(self) -> str:
        """The named place with its preposition, for example ``at the top left``."""
        row, column = self.cell
        word = PLACES[row][column]
        return f"in the {word}" if word == "centre" else f"at the {word}"


@dataclass(frozen=True)
class Drawing:
    """One to four shapes, no two alike, in reading order (by row, then by column) on a light canvas."""

    shapes: tuple[Shape, ...]
    background: Colour


def make_drawing(rng: random.Random, count: int | None = None) -> Drawing:
    """A drawing of ``count`` shapes (1 to 4; drawn from ``rng`` when None)."""
    number = count if count is not None else rng.choice((1, 2, 2, 3, 3, 3, 4, 4))
    if number not in _LARGEST:
        raise ValueError(f"a drawing holds 1 to {max(_LARGEST)} shapes, not {number}")
    shapes: list[Shape] = []
    while len(shapes) < number:
        # Starting afresh when there is no room left keeps large and small shapes equally likely.
        shapes = _place_shapes(rng, number)
    shapes.sort(key=lambda shape: shape.cell)
    tint = rng.randint(232, 250)
    background = (tint + rng.randint(-10, 5), tint + rng.randint(-10, 5), tint + rng.randint(-10, 5))
    return Drawing(tuple(shapes), background)


def render(drawing: Drawing, size: int) -> Image.Image:
    """The drawing as an RGB image of ``size`` by ``size`` pixels, with smooth edges."""
    side = size * _SUPERSAMPLE
    image = Image.new("RGB", (side, side), drawing.background)
    pen = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        x1, y1, x2, y2 = (value * side for value in shape.box)
        if shape.kind == "circle":
            pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=shape.rgb)
        else:
            points = [(x1 + u * (x2 - x1 - 1), y1 + v * (y2 - y1 - 1)) for u, v in _OUTLINES[shape.kind]]
            pen.polygon(points, fill=shape.rgb)
    return image.reduce(_SUPERSAMPLE)


def questions(drawing: Drawing, rng: random.Random) -> list[tuple[str, str, str]]:
    """Every unambiguous (question, answer, kind) about a drawing, each in one wording drawn from ``rng``."""
    return [(rng.choice(_QUESTIONS[kind]).format(about), answer, kind) for about, answer, kind in _topics(drawing)]


def questions_of_many(drawing: Drawing, which: str, rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, kind) about one of several images; ``which`` is its ordinal, such as ``second``."""
    topics = [topic for topic in _topics(drawing) if topic[2] in ("count", "describe")]
    rng.shuffle(topics)
    wordings = {kind: _QUESTIONS[kind][0].replace("the picture", f"the {which} picture") for kind in KINDS}
    return [(wordings[kind].format(about), answer, kind) for about, answer, kind in topics]


def describe(drawing: Drawing) -> str:
    """One sentence that names every shape and its place, in reading order."""
    parts = [f"a {shape.name} {shape.place}" for shape in drawing.shapes]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def format_box(box: Box) -> str:
    """A box as the models write it: ``[0.60, 0.35, 0.90, 0.80]``."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def parse_box(text: str) -> Box | None:
    """The box in a text written by ``format_box``, or None when the text is not one."""
    parts = text.strip().removeprefix("[").removesuffix("]").split(",")
    try:
        x1, y1, x2, y2 = (float(part) for part in parts)
    except ValueError:
        return None
    return x1, y1, x2, y2


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def _topics(drawing: Drawing) -> Iterator[tuple[str, str, str]]:
    """(topic, answer, kind) for everything that has exactly one right answer."""
    shapes = drawing.shapes
    yield "", describe(drawing), "describe"
    yield "shapes", _count_answer(len(shapes), "shape"), "count"
    for kind in SHAPES:
        alike = [shape for shape in shapes if shape.kind == kind]
        yield kind + "s", _count_answer(len(alike), kind), "count"
        if len(alike) == 1:
            yield kind, f"The {kind} is {alike[0].colour}.", "colour"
    for colour in COLOURS:
        alike = [shape for shape in shapes if shape.colour == colour]
        if len(alike) == 1:
            yield colour, f"The {colour} shape is a {alike[0].kind}.", "shape"
    for shape in shapes:
        yield shape.name, shape.place[0].upper() + shape.place[1:] + ".", "position"
        yield shape.name, format_box(shape.box), "box"


def _count_answer(number: int, noun: str) -> str:
    verb, ending = ("is", "") if number == 1 else ("are", "s")
    return f"There {verb} {NUMBERS[number]} {noun}{ending}."


def _third(start: int, size: int) -> int:
    """0, 1 or 2: the third of the canvas that holds the middle of an interval in grid units."""
    return min((2 * start + size) * 3 // (2 * GRID), 2)


def _is_clear(start: int, size: int) -> bool:
    """Whether the middle of an interval keeps at least 1/20 of the canvas from the borders between thirds."""
    middle = (2 * start + size) / (2 * GRID)
    return all(abs(middle - border) >= 1 / 20 for border in (1 / 3, 2 / 3))


def _place_shapes(rng: random.Random, count: int) -> list[Shape]:
    """Up to ``count`` shapes in random places; fewer where there is no room for one after some trials."""
    shapes: list[Shape] = []
    for _ in range(count):
        size = rng.randint(_SMALLEST, _LARGEST[count])
        for _ in range(20):
            left, top = rng.randint(0, GRID - size), rng.randint(0, GRID - size)
            kind, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
            shape = Shape(kind, colour, _shade(rng, COLOURS[colour]), left, top, size)
            if _is_clear(left, size) and _is_clear(top, size) and all(_fits(shape, other) for other in shapes):
                shapes.append(shape)
                break
        else:
            return shapes
    return shapes


def _fits(new: Shape, old: Shape) -> bool:
    """Whether two shapes differ in name and place and keep at least one grid unit between their boxes."""
    apart = (
        new.left + new.size < old.left
        or old.left + old.size < new.left
        or new.top + new.size < old.top
        or old.top + old.size < new.top
    )
    return apart and new.name != old.name and new.cell != old.cell


def _shade(rng: random.Random, colour: Colour) -> Colour:
    """A colour close to the given one, so that a model learns the name and not the number."""
    red, green, blue = (min(max(value + rng.randint(-14, 14), 0), 255) for value in colour)
    return red, green, blue


def _star() -> tuple[tuple[float, float], ...]:
    """A five-pointed star stretched to touch all four sides of the unit square."""
    points = []
    for step in range(10):
        radius = 1.0 if step % 2 == 0 else 0.42
        angle = math.pi * step / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    return tuple(((x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)) for x, y in points)


_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": _star(),
}
