"""LLaVA-1.5: a CLIP tower, a two-layer projector and a Llama text model, in the llava-hf layout.

N images, B rows of D images, P embeddings of an image, T tokens, H the width of the text model.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ...drawings import Drawing, render
from .family import MEAN, STD, Family
from .files import write_json, write_weights
from .layout_llava import CHAT_TEMPLATE, CLIP, LLAMA, PATCHES, published_name, train_tokenizer, write_tokenizer_files
from .packing import IGNORE, Batch, ImageBatch, Packer


class LlavaPacker(Packer):
    """Prompts as the template writes them: ``USER:``, the images, the question, ``ASSISTANT:``, the answer."""

    image, end, pad, space = "<image>", "</s>", "<pad>", "▁"

    def opening(self, images: Sequence[int]) -> list[int]:
        """BOS, and for images also ``USER:`` and all of them up to the last line break."""
        ids = [self.id_of("<s>")]
        if not images:
            return ids
        counts = iter(images)
        for token in self.encode("USER: " + "\n".join([self.image] * len(images))):
            ids.extend([token] * (next(counts) if token == self.image_id else 1))
        return ids

    def question_ids(self, question: str, first: bool, images: int) -> list[int]:
        """The question and ``ASSISTANT:``, with ``USER:`` unless the images already brought it."""
        if first and images:
            return self.encode(f"{self.image}\n{question} ASSISTANT:")[1:]
        return self.encode(f"USER: {question} ASSISTANT:")


class Llava15(Family):
    """LLaVA-1.5."""

    name: ClassVar[str] = "llava15"
    model_type: ClassVar[str] = "llava"
    packer = LlavaPacker
    processor_name: ClassVar[str] = "LlavaProcessor"

    def tokenizer(self, seed: int) -> Tokenizer:
        """A Llama-style tokenizer."""
        return train_tokenizer(seed)

    def settings(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """config.json as the published checkpoints write it."""
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": IGNORE,
            "image_seq_length": PATCHES * PATCHES,
            "image_token_index": tokenizer.token_to_id("<image>"),
            "model_type": self.model_type,
            "pad_token_id": tokenizer.token_to_id("<pad>"),
            "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                **LLAMA,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "torch_dtype": "float16",
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": CLIP,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": LLAMA["vocab_size"],
        }

    def build(self, tokenizer: Tokenizer) -> Any:
        """A model with fresh weights; wider than the usual initialisation, which suits far larger models."""
        return prepared(LlavaForConditionalGeneration(LlavaConfig(**parts(), **self.top(tokenizer))))

    def top(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The fields of the model's configuration beside its parts."""
        return {
            "image_token_index": tokenizer.token_to_id("<image>"),
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
        }

    def begin_from(self, model: Any, folder: Path) -> None:
        """Every weight of a checkpoint of this family."""
        model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())

    def training_image(self, drawing: Drawing, rng: random.Random) -> Image.Image:
        """The drawing at the model's size, a third of the time by way of a larger image, as users send them."""
        size = CLIP["image_size"]
        if rng.random() < 2 / 3:
            return render(drawing, size)
        larger = render(drawing, rng.randint(size + 1, 4 * size))
        return larger.resize((size, size), Image.Resampling.BICUBIC)

    def prepare(self, images: Sequence[Image.Image]) -> ImageBatch:
        """Normalised pixels of square images of the model's size, and the grid of patches."""
        centres = patch_grid().expand(len(images), -1, -1)
        whole = torch.ones(centres.shape[:2], dtype=torch.bool)
        return ImageBatch({"pixel_values": normalise(images)}, [PATCHES * PATCHES] * len(images), centres, whole)

    def image_embeddings(self, model: Any, images: ImageBatch) -> Tensor:
        """Projected patches of the last layer but one, without the class token."""
        states = model.model.vision_tower(**images.inputs, output_hidden_states=True).hidden_states
        return model.model.multi_modal_projector(states[-2][:, 1:])

    def tower(self, model: Any) -> nn.Module:
        """The CLIP tower."""
        return model.model.vision_tower

    def projector(self, model: Any) -> nn.Module:
        """The two linear layers between tower and text model."""
        return model.model.multi_modal_projector

    def word_embeddings(self, model: Any) -> nn.Embedding:
        """The embedding table of the Llama model."""
        return model.model.language_model.embed_tokens

    def hidden_states(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Final states of the Llama model, and how the first head of its middle layers looks at all tokens."""
        states = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            output_attentions=bool(batch.drawings),
            **(batch.images.inputs if batch.images else {}),
        )
        if not batch.drawings:
            return states.last_hidden_state, []
        return states.last_hidden_state, [states.attentions[layer][:, 0] for layer in (1, 2)]

    def along_keys(self, batch: Batch, owners: Tensor) -> Tensor:
        """The keys are the tokens, so every embedding's value goes to its image token."""
        assert batch.images is not None
        along = torch.full(batch.ids.shape, -1)
        present = torch.arange(batch.images.centres.shape[1]) < torch.tensor(batch.images.tokens)[:, None]  # (N, P)
        along[batch.image_tokens] = owners[present.reshape(owners.shape)]
        return along

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Scores by the output layer, which shares nothing with the input embedding."""
        return model.lm_head(hidden)

    def save(self, model: Any, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the folder under the published tensor names, weights in float16."""
        write_weights(folder, {published_name(name): value for name, value in model.state_dict().items()}, torch.float16)
        write_json(folder / "config.json", self.settings(tokenizer))
        write_tokenizer_files(tokenizer, folder, self.processor_name)
        write_json(folder / "preprocessor_config.json", self.image_settings())
        processor = {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": CLIP["patch_size"],
            "processor_class": self.processor_name,
            "vision_feature_select_strategy": "default",
        }
        write_json(folder / "processor_config.json", processor)
        write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})

    def image_settings(self) -> dict[str, Any]:
        """preprocessor_config.json of a CLIP image processor."""
        size = CLIP["image_size"]
        return {
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_processor_type": "CLIPImageProcessor",
            "image_std": list(STD),
            "processor_class": self.processor_name,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": size},
        }


def parts() -> dict[str, Any]:
    """Configurations of tower and text model."""
    return {
        "text_config": LlamaConfig(**LLAMA, initializer_range=0.05, tie_word_embeddings=False),
        "vision_config": CLIPVisionConfig(**CLIP, initializer_range=0.05, initializer_factor=1.0),
    }


def prepared(model: Any) -> Any:
    """A new model, ready to learn."""
    model = model.float()
    # In bfloat16 on a CPU, plain products are faster than the fused attention.
    model.set_attn_implementation("eager")
    # Words must start as large as the image embeddings they are compared with.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
    return model


def patch_grid() -> Tensor:
    """(PATCHES * PATCHES, 2) x and y of the middles of patches, as fractions, in reading order."""
    steps = (torch.arange(PATCHES) + 0.5) / PATCHES
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)


def normalise(images: Sequence[Image.Image]) -> Tensor:
    """CLIP-normalised pixels (N, 3, S, S) of N square images of one size."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std
