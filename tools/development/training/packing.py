"""Questions and answers as rows of tokens, in the exact form that a family's chat template renders.

B rows, T tokens, N images, D images of each row (N = B * D), P embeddings of an image.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ...drawings import Drawing

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A question, its answer, and the indices of the shapes that the answer speaks of, in that order."""

    question: str
    answer: str
    subjects: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedRow:
    """Token sequences for one batch row.

    ``segments`` lets several conversations share one prefix: a token sees the earlier tokens of segment 0 and
    of its own segment, so every branch reads exactly like a conversation of its own, at a fraction of the cost.
    ``targets[i]`` is the token that should follow position i, or IGNORE; ``subjects[i]`` is the index of the shape
    that this next token is about, or IGNORE.
    """

    ids: list[int]
    targets: list[int]
    subjects: list[int]
    positions: list[int]
    segments: list[int]


class Packer(ABC):
    """Turns questions and answers into rows; a family says how it writes prompts."""

    image: str  # the token that stands for an image
    end: str  # the token that ends an answer
    pad: str
    space: str  # how the vocabulary writes the space before a word

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_id, self.end_id, self.pad_id = (self.id_of(text) for text in (self.image, self.end, self.pad))
        self.separators = (self.id_of(","), self.id_of(self.space + "and"))

    @abstractmethod
    def opening(self, images: Sequence[int]) -> list[int]:
        """The tokens that all conversations about some images share; image k takes ``images[k]`` of them."""

    @abstractmethod
    def question_ids(self, question: str, first: bool, images: int) -> list[int]:
        """The tokens after the opening or the last answer, up to the answer to ``question``."""

    def id_of(self, token: str) -> int:
        """The id of one token of the vocabulary."""
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"the tokenizer lacks {token}")
        return index

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, example: Example, first: bool, images: int) -> tuple[list[int], list[int], list[int]]:
        """Ids of one question and its answer, their targets and subjects.

        The target of the last token of the answer is the end token, which is not itself among the ids: where a
        template renders it after earlier answers, the next question begins with it.
        """
        question, answer = self.question_ids(example.question, first, images), self.encode(example.answer)
        ignored = [IGNORE] * (len(question) - 1)
        subjects = [*ignored, *self.subjects(example, answer), IGNORE]
        return question + answer, [*ignored, *answer, self.end_id], subjects

    def subjects(self, example: Example, answer: Sequence[int]) -> list[int]:
        """For each token of an answer, the shape it is about; a list moves on at every comma and ``and``."""
        if len(example.subjects) < 2:
            return [example.subjects[0] if example.subjects else IGNORE] * len(answer)
        clauses = itertools.accumulate(token in self.separators for token in answer)
        return [example.subjects[clause] for clause in clauses]

    def branches(self, examples: Iterable[Example], images: Sequence[int], budget: int) -> PackedRow:
        """As many one-turn conversations as fit into ``budget`` tokens, sharing one opening."""
        ids = self.opening(images)
        start, segment = len(ids), 0
        row = PackedRow(ids, [IGNORE] * start, [IGNORE] * start, list(range(start)), [0] * start)
        for example in examples:
            turn, targets, subjects = self.turn(example, True, len(images))
            if segment and len(row.ids) + len(turn) > start + budget:
                continue
            segment += 1
            row.ids.extend(turn)
            row.targets.extend(targets)
            row.subjects.extend(subjects)
            row.positions.extend(range(start, start + len(turn)))
            row.segments.extend([segment] * len(turn))
        return row

    def conversation(self, examples: Iterable[Example], images: Sequence[int], budget: int) -> PackedRow:
        """One conversation of as many turns as fit into ``budget`` tokens after the opening."""
        ids = self.opening(images)
        start = len(ids)
        targets, subjects = [IGNORE] * start, [IGNORE] * start
        for example in examples:
            first = len(ids) == start
            turn, turn_targets, turn_subjects = self.turn(example, first, len(images))
            if not first and len(ids) + len(turn) > start + budget:
                continue
            ids, targets, subjects = ids + turn, targets + turn_targets, subjects + turn_subjects
        return PackedRow(ids, targets, subjects, list(range(len(ids))), [0] * len(ids))


@dataclass(frozen=True)
class ImageBatch:
    """Prepared images, and where in its image each of their embeddings looks."""

    inputs: dict[str, Tensor]  # by the names that the model gives them, N first
    tokens: list[int]  # N: how many prompt tokens each takes
    centres: Tensor  # (N, P, 2) float32, x and y as fractions of the image; NaN for what looks at no place
    whole: Tensor  # (N, P) bool: the embedding comes from a view of the whole image


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows of T tokens, and the images they speak of."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    subjects: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    image_tokens: Tensor  # (B, T) bool: the tokens that stand for images
    mask: Tensor  # (B, 1, T, T) float32, 0 where a query may look and hugely negative elsewhere
    images: ImageBatch | None = None
    drawings: Sequence[tuple[Drawing, ...]] = ()  # of each row, where all have equally many


def collate(rows: Sequence[PackedRow], packer: Packer) -> Batch:
    """Pad rows on the right and build the mask that keeps branches apart."""
    length = max(len(row.ids) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    segments = padded((row.segments for row in rows), 0)
    of_key, of_query = segments[:, None, :], segments[:, :, None]  # (B, 1, T) keys, (B, T, 1) queries
    visible = ((of_key == 0) | (of_key == of_query)) & torch.ones(length, length, dtype=torch.bool).tril()
    ids = padded((row.ids for row in rows), packer.pad_id)
    return Batch(
        ids,
        padded((row.targets for row in rows), IGNORE),
        padded((row.subjects for row in rows), IGNORE),
        padded((row.positions for row in rows), 0),
        ids == packer.image_id,
        torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
    )
