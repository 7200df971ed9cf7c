"""Questions and answers as rows of tokens, in the exact form that a family's chat template renders.

B rows, T tokens, N pictures, D pictures of each row (N = B * D), P embeddings of a picture.
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
class Ask:
    """A question, its answer, and the indices of the shapes that the answer speaks of, in that order."""

    question: str
    answer: str
    subjects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Packed:
    """Token sequences for one batch row.

    ``segments`` lets several conversations share one prefix: a token sees the earlier tokens of segment 0 and
    of its own segment, so every branch reads exactly like a conversation of its own, at a fraction of the cost.
    ``targets[i]`` is the token that should follow position i, or IGNORE; ``looks[i]`` is the index of the shape
    that this next token is about, or IGNORE.
    """

    ids: list[int]
    targets: list[int]
    looks: list[int]
    positions: list[int]
    segments: list[int]


class Packer(ABC):
    """Turns questions and answers into rows; a family says how it writes prompts."""

    image: str  # the token that stands for a picture
    end: str  # the token that ends an answer
    pad: str
    space: str  # how the vocabulary writes the space before a word

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image_id, self.end_id, self.pad_id = (self.id_of(text) for text in (self.image, self.end, self.pad))
        self.separators = (self.id_of(","), self.id_of(self.space + "and"))

    @abstractmethod
    def opening(self, pictures: Sequence[int]) -> list[int]:
        """The tokens that all conversations about some pictures share; picture k takes ``pictures[k]`` of them."""

    @abstractmethod
    def asked(self, question: str, first: bool, pictures: int) -> list[int]:
        """What follows the opening or the last answer, up to where the answer to ``question`` begins."""

    def id_of(self, token: str) -> int:
        """The id of one token of the vocabulary."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer lacks {token}")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def turn(self, ask: Ask, first: bool, pictures: int) -> tuple[list[int], list[int], list[int]]:
        """Ids of one question and its answer, their targets and looks.

        The last token of the answer is asked for the end token, which is not itself among the ids: where a
        template renders it after earlier answers, the next question begins with it.
        """
        asked, said = self.asked(ask.question, first, pictures), self.encode(ask.answer)
        unasked = [IGNORE] * (len(asked) - 1)
        return asked + said, [*unasked, *said, self.end_id], [*unasked, *self.looks(ask, said), IGNORE]

    def looks(self, ask: Ask, said: Sequence[int]) -> list[int]:
        """For each token of an answer, the shape it is about; a list moves on at every comma and ``and``."""
        if len(ask.subjects) < 2:
            return [ask.subjects[0] if ask.subjects else IGNORE] * len(said)
        clauses = itertools.accumulate(token in self.separators for token in said)
        return [ask.subjects[clause] for clause in clauses]

    def branches(self, asks: Iterable[Ask], pictures: Sequence[int], budget: int) -> Packed:
        """As many one-turn conversations as fit into ``budget`` tokens, sharing one opening."""
        ids = self.opening(pictures)
        start, segment = len(ids), 0
        row = Packed(ids, [IGNORE] * start, [IGNORE] * start, list(range(start)), [0] * start)
        for ask in asks:
            turn, targets, looks = self.turn(ask, True, len(pictures))
            if segment and len(row.ids) + len(turn) > start + budget:
                continue
            segment += 1
            row.ids.extend(turn)
            row.targets.extend(targets)
            row.looks.extend(looks)
            row.positions.extend(range(start, start + len(turn)))
            row.segments.extend([segment] * len(turn))
        return row

    def conversation(self, asks: Iterable[Ask], pictures: Sequence[int], budget: int) -> Packed:
        """One conversation of as many turns as fit into ``budget`` tokens after the opening."""
        ids = self.opening(pictures)
        start = len(ids)
        targets, looks = [IGNORE] * start, [IGNORE] * start
        for ask in asks:
            first = len(ids) == start
            turn, wanted, seen = self.turn(ask, first, len(pictures))
            if not first and len(ids) + len(turn) > start + budget:
                continue
            ids, targets, looks = ids + turn, targets + wanted, looks + seen
        return Packed(ids, targets, looks, list(range(len(ids))), [0] * len(ids))


@dataclass(frozen=True)
class Pictures:
    """Prepared pictures, and where in its picture each of their embeddings looks."""

    inputs: dict[str, Tensor]  # by the names that the model gives them, N first
    tokens: list[int]  # N: how many prompt tokens each takes
    centres: Tensor  # (N, P, 2) float32, x and y as fractions of the picture; NaN for what looks at no place
    whole: Tensor  # (N, P) bool: the embedding comes from a view of the whole picture


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows of T tokens, and the pictures they speak of."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    looks: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    images: Tensor  # (B, T) bool: the tokens that stand for pictures
    mask: Tensor  # (B, 1, T, T) float32, 0 where a query may look and hugely negative elsewhere
    pictures: Pictures | None = None
    drawings: Sequence[tuple[Drawing, ...]] = ()  # of each row, where all have equally many


def collate(rows: Sequence[Packed], packer: Packer) -> Batch:
    """Pad rows on the right and build the mask that keeps branches apart."""
    length = max(len(row.ids) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    segments = padded((row.segments for row in rows), 0)
    seen, own = segments[:, None, :], segments[:, :, None]  # (B, 1, T) keys, (B, T, 1) queries
    visible = ((seen == 0) | (seen == own)) & torch.ones(length, length, dtype=torch.bool).tril()
    ids = padded((row.ids for row in rows), packer.pad_id)
    return Batch(
        ids,
        padded((row.targets for row in rows), IGNORE),
        padded((row.looks for row in rows), IGNORE),
        padded((row.positions for row in rows), 0),
        ids == packer.image_id,
        torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
    )
