"""Llama-3.2-Vision: a tiled tower whose features a Llama text model reads by cross-attention, in Meta's hub layout.

N images, B rows of D images, P = tiles * (patches + 1) embeddings of an image, in the order of tile and token.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import (
    MllamaImageProcessorPil,
    get_image_size_fit_to_canvas,
)

from ...drawings import Drawing, render
from .family import Family, Schedule
from .files import write_json, write_weights
from .layout_mllama import (
    BOS,
    CHAT_TEMPLATE,
    CROSS_LAYERS,
    END,
    FORMS,
    IMAGE,
    PAD,
    PATCH,
    SIDE,
    TILE,
    TILES,
    any_day,
    header,
    image_settings,
    published_config,
    published_name,
    system_text,
    text_settings,
    token_id,
    token_ids,
    train_tokenizer,
    vision_settings,
    write_tokenizer_files,
)
from .packing import Batch, ImageBatch, Packer


class MllamaPacker(Packer):
    """Prompts as the template writes them: headers, the images first, and every message closed."""

    image, end, pad, space = IMAGE, END, PAD, "Ġ"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.days = random.Random(0)

    def opening(self, images: Sequence[int]) -> list[int]:
        """BOS, the block of dates where there is no image, the header of the user, and all images."""
        system = "" if images else header("system") + system_text(self.day()) + END
        return self.encode(BOS + system + header("user") + IMAGE * len(images))

    def day(self) -> str:
        """The date that a conversation without an image begins with."""
        return any_day(self.days)

    def question_ids(self, question: str, first: bool, images: int) -> list[int]:
        """The question, after the opening or a header of its own, and the header of the answer."""
        before = "" if first else END + header("user")
        return self.encode(before + question + END + header("assistant"))


class Mllama(Family):
    """Llama-3.2-Vision Instruct."""

    name = "mllama"
    model_type = "mllama"
    packer = MllamaPacker
    schedule = Schedule(vision_steps=1200, vision_batch=32, steps=2000)
    pairs = False
    any_form = True
    ranks = True

    def __init__(self) -> None:
        self.processor: Any = MllamaImageProcessorPil(**image_settings())

    def tokenizer(self, seed: int) -> Tokenizer:
        """A Llama-3-style tokenizer."""
        return train_tokenizer(seed)

    def build(self, tokenizer: Tokenizer) -> MllamaForConditionalGeneration:
        """A model with fresh weights; its gates stand open, or it would be long before it saw anything."""
        text, vision = text_settings(tokenizer), vision_settings()
        config = MllamaConfig(
            text_config=MllamaTextConfig(**text, initializer_range=0.05),
            vision_config=MllamaVisionConfig(**vision, initializer_range=0.05),
            image_token_index=token_id(tokenizer, IMAGE),
        )
        model = MllamaForConditionalGeneration(config).float()
        model.set_attn_implementation("eager")
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
        tower = model.model.vision_model
        tower.gated_positional_embedding.tile_embedding.weight.data = 1.5 * waves(tower.hidden_size)
        for name, weight in model.named_parameters():
            if "gate" in name.rsplit(".", 1)[-1]:
                nn.init.ones_(weight)
        return model

    def begin_from(self, model: MllamaForConditionalGeneration, folder: Path) -> None:
        """Every weight of a checkpoint of this family."""
        model.load_state_dict(MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())

    def training_image(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """Mostly square: as large as a tile, as four tiles, or anything between; sometimes wide or tall."""
        choice = rng.random()
        if choice < 0.25:
            return render(drawing, TILE)
        if choice < 0.65:
            return render(drawing, 2 * TILE)
        if choice < 0.85:
            return render(drawing, rng.randint(TILE + 1, 2 * TILE))
        short, long = rng.randint(TILE // 2, 2 * TILE), rng.randint(TILE // 2, 4 * TILE)
        form = (short, long) if rng.random() < 1 / 2 else (long, short)
        return render(drawing, 2 * TILE).resize(form, Image.Resampling.BICUBIC)

    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """Tiles by the published processor; the first token of a tile is its class token."""
        features = self.processor([[image] for image in images], return_tensors="pt")
        inputs = {name: features[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        forms = [FORMS[index - 1] for index in inputs["aspect_ratio_ids"].flatten().tolist()]
        centres = torch.stack([tile_centres(p.size, form) for p, form in zip(images, forms, strict=True)])
        return ImageBatch(inputs, [1] * len(images), centres, torch.ones(centres.shape[:2], dtype=torch.bool))

    def image_embeddings(self, model: MllamaForConditionalGeneration, images: ImageBatch) -> Tensor:
        """Projected features of every token of every tile."""
        states = model.model.vision_model(**images.inputs).last_hidden_state  # (N, 1, tiles, patches + 1, F)
        return model.model.multi_modal_projector(states).flatten(1, 3)

    def tower(self, model: MllamaForConditionalGeneration) -> nn.Module:
        """The tower of local and global layers."""
        return model.model.vision_model

    def projector(self, model: MllamaForConditionalGeneration) -> nn.Module:
        """The linear layer between tower and text model."""
        return model.model.multi_modal_projector

    def word_embeddings(self, model: MllamaForConditionalGeneration) -> nn.Embedding:
        """The embedding table of the text model."""
        return model.model.language_model.embed_tokens

    def frozen(self, model: MllamaForConditionalGeneration) -> list[nn.Module]:
        """Nothing: only in the tower do patches see each other, so what sentences need must be learnt there."""
        return []

    def hidden_states(self, model: MllamaForConditionalGeneration, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Final states, and how the first head of the later cross-attention layers looks at the tiles."""
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions, "use_cache": False}
        if batch.images is None:
            return model.model(**inputs).last_hidden_state, []
        rows = len(batch.ids)
        embeddings = self.image_embeddings(model, batch.images)
        tiles = batch.images.inputs["aspect_ratio_mask"].reshape(rows, 1, -1, TILES)
        states = model.model(
            **inputs,
            cross_attention_states=embeddings.reshape(rows, -1, embeddings.shape[-1]),
            cross_attention_mask=visible(batch)[..., None] * tiles,
            output_attentions=True,
        )
        return states.last_hidden_state, [states.attentions[layer][:, 0] for layer in CROSS_LAYERS[1:]]

    def along_keys(self, batch: Batch, owners: Tensor) -> Tensor:
        """The keys of cross-attention are the embeddings themselves."""
        return owners

    def logits(self, model: MllamaForConditionalGeneration, hidden: Tensor) -> Tensor:
        """Scores by the output layer, which knows no image token."""
        return model.lm_head(hidden)

    def save(self, model: MllamaForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the folder under the published tensor names, weights in bfloat16."""
        write_weights(folder, {published_name(name): value for name, value in model.state_dict().items()}, torch.bfloat16)
        write_json(folder / "config.json", published_config(tokenizer))
        write_json(folder / "preprocessor_config.json", image_settings())
        write_tokenizer_files(tokenizer, folder)
        write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
        generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, **token_ids(tokenizer)}
        write_json(folder / "generation_config.json", generation)


def waves(width: int) -> Tensor:
    """(forms + 1, tiles * (patches + 1) * width) sines and cosines of the place of each token on its canvas.

    A place says the same on every canvas, so that what is learnt on one form of image holds for the others.
    """
    table = torch.zeros(len(FORMS) + 1, TILES, 1 + SIDE * SIDE, width)
    cycles = torch.arange(1, width // 4 + 1) / 4
    for index, (rows, columns) in enumerate(FORMS, 1):
        places = tile_centres((columns * TILE, rows * TILE), (rows, columns)).nan_to_num(0)  # (P, 2)
        angles = 2 * torch.pi * places[..., None] * cycles  # (P, 2, width / 4)
        table[index] = torch.cat((angles.sin(), angles.cos()), dim=-1).reshape(TILES, -1, width)
    return table.flatten(1)


def tile_centres(size: tuple[int, int], form: Sequence[int]) -> Tensor:
    """(P, 2) places of all tokens of an image of ``size`` (width, height) on ``form`` (rows, columns) of tiles."""
    height, width = get_image_size_fit_to_canvas(size[1], size[0], form[0] * TILE, form[1] * TILE, TILE)
    centres = torch.full((TILES, 1 + SIDE * SIDE, 2), torch.nan)
    steps = (torch.arange(SIDE) + 0.5) * PATCH
    inside = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
    for tile in range(form[0] * form[1]):
        corner = torch.tensor([tile % form[1] * TILE, tile // form[1] * TILE])
        centres[tile, 1:] = (inside + corner) / torch.tensor([width, height])
    centres[(centres > 1).any(-1)] = torch.nan
    return centres.flatten(0, 1)


def visible(batch: Batch) -> Tensor:
    """(B, T, D): 1 from the token of each image on; all images of a row follow one another."""
    count = batch.image_tokens.cumsum(1)  # (B, T)
    return (count[..., None] > torch.arange(int(count[0, -1]))).long()
