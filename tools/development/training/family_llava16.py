"""LLaVA-1.6, also called LLaVA-NeXT: LLaVA-1.5 that also sees an image cut into tiles, in the llava-hf layout.

The images pass through transformers' own cutting and packing. An image's embeddings are those of one view of
the whole, then rows of tile patches, each row closed by the newline embedding.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from ...drawings import Drawing, render
from .family import Schedule
from .family_llava15 import Llava15, parts, patch_grid, prepared
from .layout_llava import CLIP, PATCHES
from .packing import ImageBatch

TILE: int = CLIP["image_size"]
# (height, width) in tiles, in the published order.
FORMS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[rows * TILE, columns * TILE] for rows, columns in FORMS]


class Llava16(Llava15):
    """LLaVA-1.6; it learns soonest from the weights of a finished LLaVA-1.5."""

    name = "llava16"
    model_type = "llava_next"
    processor_name = "LlavaNextProcessor"
    schedule = Schedule(vision_steps=0, steps=500, batch=8, rate=5e-4)
    any_form = True

    def __init__(self) -> None:
        settings = self.image_settings()
        del settings["image_processor_type"], settings["processor_class"]
        self.processor = LlavaNextImageProcessorPil(**settings)

    def settings(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """config.json as the published checkpoints write it."""
        return {
            **super().settings(tokenizer),
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": PINPOINTS,
            "use_image_newline_parameter": True,
        }

    def build(self, tokenizer: Tokenizer) -> Any:
        """A model with fresh weights."""
        config = LlavaNextConfig(**parts(), **self.top(tokenizer), image_grid_pinpoints=PINPOINTS)
        return prepared(LlavaNextForConditionalGeneration(config))

    def begin_from(self, model: Any, folder: Path) -> None:
        """Every weight of a LLaVA-1.5 or LLaVA-1.6 checkpoint; after a LLaVA-1.5 the newline embedding stays fresh."""
        start = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model.load_state_dict({"model.image_newline": model.model.image_newline.data, **start.state_dict()})

    def training_image(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """Mostly square and large enough for four tiles; sometimes of one tile, sometimes wide or tall."""
        choice = rng.random()
        if choice < 0.5:
            return render(drawing, 2 * TILE)
        if choice < 0.7:
            return render(drawing, rng.randint(TILE + 1, 4 * TILE))
        if choice < 0.8:
            return render(drawing, TILE)
        short, long = rng.randint(TILE // 2, 2 * TILE), rng.randint(TILE, 3 * TILE)
        form = (short, long) if rng.random() < 1 / 2 else (long, short)
        return render(drawing, 2 * TILE).resize(form, Image.Resampling.BICUBIC)

    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """Views by the published processor."""
        features = self.processor(list(images), return_tensors="pt")
        inputs = {name: features[name] for name in ("pixel_values", "image_sizes")}
        places = [view_centres(image.size) for image in images]
        centres = pad_sequence(places, batch_first=True, padding_value=torch.nan)
        whole = torch.arange(centres.shape[1]).expand(len(images), -1) < PATCHES * PATCHES
        return ImageBatch(inputs, [len(place) for place in places], centres, whole)

    def image_embeddings(self, model: Any, images: ImageBatch) -> Tensor:
        """PackedRow embeddings, padded with zeros to the longest image."""
        packed = model.model.get_image_features(**images.inputs, return_dict=True).pooler_output
        return pad_sequence(list(packed), batch_first=True)

    def image_settings(self) -> dict[str, Any]:
        """preprocessor_config.json of an image processor that cuts tiles."""
        kind = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "image_grid_pinpoints": PINPOINTS}
        return {**super().image_settings(), "aspect_ratio_setting": "anyres", **kind}


def view_centres(size: tuple[int, int]) -> Tensor:
    """(P, 2) places of all embeddings of an image of ``size`` (width, height), by the rules of cutting and packing."""
    width, height = size
    best = select_best_resolution((height, width), PINPOINTS)
    canvas = torch.tensor([best[1], best[0]])  # x, y in pixels, as below
    scale = min(best[1] / width, best[0] / height)
    scaled = torch.tensor([width, height]) * scale
    rows, columns = best[0] // TILE * PATCHES, best[1] // TILE * PATCHES
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    pixels = torch.stack((x, y), dim=-1) * CLIP["patch_size"]
    places = ((pixels - (canvas - scaled) / 2) / scaled).permute(2, 0, 1)  # (2, rows, columns)
    unpadded = pad(unpad_image(places, (height, width)), (0, 1), value=torch.nan)
    return torch.cat((patch_grid(), unpadded.flatten(1).T))
