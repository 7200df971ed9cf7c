"""Reading shape, colour and box off every image embedding: the first lesson of a vision tower.

N images, P embeddings of each, B rows of D images, H the width of the text model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...drawings import COLOURS, GRID, SHAPES, Drawing, Shape
from .packing import IGNORE, ImageBatch, Packer

# Classes of the targets of a patch: shape, colour, left, top, right, bottom of its box, and place in the reading order.
PATCH_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, *[GRID + 1] * 4, 4)


def under(shape: Shape, centres: np.ndarray) -> np.ndarray:
    """(P,) bool: the embeddings whose centres (P, 2) lie in the box of a shape; a NaN lies nowhere."""
    x, y = (centres * GRID).T
    return (x >= shape.left) & (x <= shape.left + shape.size) & (y >= shape.top) & (y <= shape.top + shape.size)


def patch_targets(drawings: Sequence[Drawing], images: ImageBatch) -> Tensor:
    """(N, P, 7): shape, colour, box and rank of the shape under each patch; 0, 0 and IGNORE where there is none.

    Only views of the whole image have box targets: a tile does not know which part it shows. Embeddings without a
    place have no targets.
    """
    centres, whole = images.centres.numpy(), images.whole.numpy()
    targets = np.full((*whole.shape, len(PATCH_CLASSES)), IGNORE, dtype=np.int64)
    targets[~np.isnan(centres).any(-1), :2] = 0
    for index, drawing in enumerate(drawings):
        for rank, shape in enumerate(drawing.shapes):
            inside = under(shape, centres[index])
            targets[index, inside, :2] = SHAPES.index(shape.kind) + 1, tuple(COLOURS).index(shape.colour) + 1
            box = shape.left, shape.top, shape.left + shape.size, shape.top + shape.size
            targets[index, inside & whole[index], 2:] = (*box, rank)
    return torch.from_numpy(targets)


def patch_owners(rows: Sequence[tuple[Drawing, ...]], images: ImageBatch) -> Tensor:
    """(B, D * P): the index, among the shapes of its row, of the shape under each embedding, or -1."""
    centres = images.centres.numpy().reshape(len(rows), len(rows[0]), -1, 2)
    owners = np.full(centres.shape[:-1], -1)
    for row, drawings in enumerate(rows):
        shapes = ((column, shape) for column, drawing in enumerate(drawings) for shape in drawing.shapes)
        for index, (column, shape) in enumerate(shapes):
            owners[row, column, under(shape, centres[row, column])] = index
    return torch.from_numpy(owners.reshape(len(rows), -1))


class PatchProbe(nn.Module):
    """Reads shape, colour and box off each image embedding.

    The scores of shapes and colours are products with the embeddings of their words, so that an image of
    something red comes to resemble the word "red", as it does in a tower that was trained on captions. The text
    model then learns to read it much sooner. The rest of the probe is dropped.
    """

    def __init__(self, words: nn.Embedding, packer: Packer, ranks: bool) -> None:
        super().__init__()
        self.words = words
        names = (SHAPES, tuple(COLOURS))
        self.rows = [torch.tensor([packer.id_of(packer.space + word) for word in group]) for group in names]
        self.nothing = nn.Linear(words.embedding_dim, len(names))
        self.classes = PATCH_CLASSES[2:] if ranks else PATCH_CLASSES[2:-1]
        self.rest = nn.Linear(words.embedding_dim, sum(self.classes))

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Scores (M, classes) for the first entries of PATCH_CLASSES, from embeddings (M, H)."""
        nothing = self.nothing(embeddings).split(1, dim=-1)
        named = [
            torch.cat((none, embeddings @ self.words.weight[rows].T), dim=-1)
            for none, rows in zip(nothing, self.rows, strict=True)
        ]
        return [*named, *self.rest(embeddings).split(self.classes, dim=-1)]

    def losses(self, scores: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Mean cross entropy of each entry, from scores (M, classes) and targets (M, 7)."""
        losses = [cross_entropy(score.float(), targets[:, i], ignore_index=IGNORE) for i, score in enumerate(scores)]
        return torch.stack(losses)
