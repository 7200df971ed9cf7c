"""The interface of one model architecture for the training loop."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from ...drawings import Drawing
from .packing import Batch, ImageBatch, Packer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn; steps and not minutes, so that a seed gives the same run anywhere."""

    vision_steps: int = 450
    vision_batch: int = 64
    steps: int = 3000
    batch: int = 16
    budget: int = 200  # tokens a row may add to its opening
    rate: float = 2e-3  # of AdamW; Muon takes ten times as much
    guide: float = 0.3  # weight of looking at the right patches
    extra_every: int = 5  # every so many steps, also two images and none
    drill: tuple[str, ...] = ("describe",)  # kinds of question that mostly come first, so that all rows have them


class Family(ABC):
    """One architecture: how it is built, sees images, writes prompts and is saved."""

    name: ClassVar[str]
    model_type: ClassVar[str]  # as config.json names it
    packer: ClassVar[type[Packer]]
    schedule: ClassVar[Schedule] = Schedule()
    # Whether it can tell the images of one message apart, and whether its image tokens follow their form.
    pairs: ClassVar[bool] = True
    any_form: ClassVar[bool] = False
    # Whether patches also learn which in the reading order their shape is, as no later layer can compare patches.
    ranks: ClassVar[bool] = False

    @abstractmethod
    def tokenizer(self, seed: int) -> Tokenizer:
        """A tokenizer trained on sentences about drawings."""

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> nn.Module:
        """A model with fresh weights."""

    @abstractmethod
    def begin_from(self, model: Any, folder: Path) -> None:
        """Copy what a finished checkpoint of this or a kindred family has in common with the model."""

    @abstractmethod
    def training_image(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """A training image of a drawing."""

    @abstractmethod
    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """Images as the model takes them."""

    @abstractmethod
    def image_embeddings(self, model: Any, images: ImageBatch) -> Tensor:
        """(N, P, H): the embeddings of each image for the text model."""

    @abstractmethod
    def tower(self, model: Any) -> nn.Module:
        """The vision tower."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """The module from features of the tower to image embeddings."""

    @abstractmethod
    def word_embeddings(self, model: Any) -> nn.Embedding:
        """The text model's input embedding (V, H)."""

    @abstractmethod
    def hidden_states(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(B, T, H) final states of the text model, and how some heads look at K keys, (B, T, K) each.

        The list is empty for a batch without drawings.
        """

    @abstractmethod
    def along_keys(self, batch: Batch, owners: Tensor) -> Tensor:
        """Spread one value per embedding, (B, D * P), over the keys of ``hidden_states``: (B, K), -1 elsewhere."""

    @abstractmethod
    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """(..., V) scores of the next token."""

    @abstractmethod
    def save(self, model: Any, tokenizer: Tokenizer, folder: Path) -> None:
        """Write every file of a published checkpoint of this family."""

    def frozen(self, model: Any) -> list[nn.Module]:
        """Parts that no longer learn once sentences are learnt."""
        return [self.tower(model)]
