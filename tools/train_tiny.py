"""Train a miniature vision-language model on drawings of shapes, and measure how often it is right.

The result is a small but real checkpoint: the published architecture, file layout and chat template, trained
until its answers can be checked word for word. Data, packing, training loop and evaluation know nothing of the
model family; a ``Family`` builds the model, places the picture in the prompt and writes the folder.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .drawings import (
    COLOURS,
    GRID,
    KINDS,
    SHAPES,
    Drawing,
    Shape,
    iou,
    make_drawing,
    parse_box,
    questions,
    questions_of_many,
    render,
)

# Training drawings come from seeds below this one, held-out drawings from seeds at or above it.
HELD_OUT_SEED = 1_000_000
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE = -100
NO_PICTURE = "Please show me a picture."
GREETINGS = ("Hello!", "Hello.", "Hi!", "Hi, who are you?", "Good morning!", "What can you do?", "Who are you?")

# The rules of the published LLaVA-1.5 template: pictures first, then text, a space after every part.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


# --- Tokenizer ---------------------------------------------------------------------------------------------


def corpus(seed: int, drawings: int = 3000) -> Iterator[str]:
    """Sentences like those the model will read and write, for training the tokenizer."""
    rng = random.Random(seed)
    for _ in range(drawings):
        drawing = make_drawing(rng)
        asked = questions(drawing, rng) + questions_of_many(drawing, rng.choice(("first", "second")), rng)
        for question, answer, _ in asked:
            yield f"USER: {question} ASSISTANT: {answer}"
    for greeting in GREETINGS * 20:
        yield f"USER: {greeting} ASSISTANT: {NO_PICTURE}"


def learn_merges(seed: int, limit: int) -> tuple[list[str], list[tuple[str, str]]]:
    """BPE pieces and merges of the corpus; a merge never crosses a word or joins two digits."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + limit, initial_alphabet=letters, min_frequency=20, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in learned["merges"]]


def build_tokenizer(seed: int, merges: int = 220) -> Tokenizer:
    """A Llama-style tokenizer: BPE with byte fallback, ``▁`` for spaces, and ``<image>`` and ``<pad>`` added."""
    pieces, merge_list = learn_merges(seed, merges)
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + pieces:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merge_list, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


# --- Packed sequences --------------------------------------------------------------------------------------


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


class Packer:
    """Turns questions and answers into rows, in the exact form the chat template renders."""

    def __init__(self, tokenizer: Tokenizer, image_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.image_id = self.id_of("<image>")
        self.bos, self.eos = self.id_of("<s>"), self.id_of("</s>")
        self.separators = (self.id_of(","), self.id_of("▁and"))

    def id_of(self, token: str) -> int:
        """The id of one token of the vocabulary."""
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer lacks {token}")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS, every ``<image>`` repeated as often as a picture has tokens."""
        ids: list[int] = []
        for token in self.tokenizer.encode(text, add_special_tokens=False).ids:
            ids.extend([token] * (self.image_tokens if token == self.image_id else 1))
        return ids

    def turn(self, ask: Ask, pictures: int = 0) -> tuple[list[int], list[int], list[int]]:
        """Ids that follow the opening (``USER:`` and pictures, if any), their targets and looks, for one turn.

        The last token of the answer is asked for ``</s>``, which itself never becomes an input: the template
        does not render it after earlier answers.
        """
        if pictures:
            asked = self.tokenizer.encode(f"<image>\n{ask.question} ASSISTANT:", add_special_tokens=False).ids[1:]
        else:
            asked = self.encode(f"USER: {ask.question} ASSISTANT:")
        said = self.encode(ask.answer)
        unasked = [IGNORE] * (len(asked) - 1)
        return asked + said, [*unasked, *said, self.eos], [*unasked, *self.looks(ask, said), IGNORE]

    def looks(self, ask: Ask, said: Sequence[int]) -> list[int]:
        """For each token of an answer, the shape it is about; a list moves on at every comma and ``and``."""
        if len(ask.subjects) < 2:
            return [ask.subjects[0] if ask.subjects else IGNORE] * len(said)
        clauses = itertools.accumulate(token in self.separators for token in said)
        return [ask.subjects[clause] for clause in clauses]

    def opening(self, pictures: int) -> list[int]:
        """BOS, and for pictures also ``USER:`` and all of them up to the last line break."""
        return [self.bos] + (self.encode("USER: " + "\n".join(["<image>"] * pictures)) if pictures else [])

    def branches(self, asks: Iterable[Ask], pictures: int, budget: int) -> Packed:
        """As many one-turn conversations as fit into ``budget`` tokens, sharing one opening."""
        ids = self.opening(pictures)
        start, segment = len(ids), 0
        row = Packed(ids, [IGNORE] * start, [IGNORE] * start, list(range(start)), [0] * start)
        for ask in asks:
            turn, targets, looks = self.turn(ask, pictures)
            if segment and len(row.ids) + len(turn) > start + budget:
                continue
            segment += 1
            row.ids.extend(turn)
            row.targets.extend(targets)
            row.looks.extend(looks)
            row.positions.extend(range(start, start + len(turn)))
            row.segments.extend([segment] * len(turn))
        return row

    def conversation(self, asks: Iterable[Ask], pictures: int, budget: int) -> Packed:
        """One conversation of as many turns as fit into ``budget`` tokens after the opening."""
        ids = self.opening(pictures)
        start = len(ids)
        targets, looks = [IGNORE] * start, [IGNORE] * start
        for ask in asks:
            turn, wanted, seen = self.turn(ask, pictures if len(ids) == start else 0)
            if len(ids) > start and len(ids) + len(turn) > start + budget:
                continue
            ids, targets, looks = ids + turn, targets + wanted, looks + seen
        return Packed(ids, targets, looks, list(range(len(ids))), [0] * len(ids))


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows of T tokens and N pictures of S pixels a side."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    looks: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64
    mask: Tensor  # (B, 1, T, T) float32, 0 where a query may look and hugely negative elsewhere
    pixels: Tensor | None  # (N, 3, S, S) float32
    drawings: Sequence[tuple[Drawing, ...]] = ()  # of each row, where all have equally many


def collate(rows: Sequence[Packed], pad: int, pictures: Sequence[Image.Image]) -> Batch:
    """Pad rows on the right and build the mask that keeps branches apart."""
    length = max(len(row.ids) for row in rows)

    def padded(values: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    segments = padded((row.segments for row in rows), 0)
    seen, own = segments[:, None, :], segments[:, :, None]  # (B, 1, T) keys, (B, T, 1) queries
    visible = ((seen == 0) | (seen == own)) & torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(
        padded((row.ids for row in rows), pad),
        padded((row.targets for row in rows), IGNORE),
        padded((row.looks for row in rows), IGNORE),
        padded((row.positions for row in rows), 0),
        torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None],
        normalise(pictures) if pictures else None,
    )


def normalise(pictures: Sequence[Image.Image]) -> Tensor:
    """CLIP-normalised pixels (N, 3, S, S) of N square pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (pixels.float() / 255 - mean) / std


class Data:
    """Endless training batches, all from one random number generator."""

    def __init__(self, packer: Packer, image_size: int, seed: int) -> None:
        if not 0 <= seed < HELD_OUT_SEED:
            raise ValueError(f"training seeds lie between 0 and {HELD_OUT_SEED - 1}")
        self.packer, self.image_size = packer, image_size
        self.rng = random.Random(seed)
        self.pad = packer.id_of("<pad>")

    def picture(self, drawing: Drawing) -> Image.Image:
        """The drawing at the model's size, a third of the time by way of a larger picture, as users send them."""
        if self.rng.random() < 2 / 3:
            return render(drawing, self.image_size)
        larger = render(drawing, self.rng.randint(self.image_size + 1, 4 * self.image_size))
        return larger.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def scenes(self, count: int, most: int) -> tuple[list[Drawing], Tensor]:
        """``count`` drawings of at most ``most`` shapes and their pixels (count, 3, S, S)."""
        drawings = [self.drawing(most) for _ in range(count)]
        return drawings, normalise([self.picture(drawing) for drawing in drawings])

    def drawing(self, most: int = 4) -> Drawing:
        """A random drawing of at most ``most`` shapes."""
        return make_drawing(self.rng, None if most >= 4 else self.rng.randint(1, most))

    def one_picture(self, rows: int, budget: int, most: int) -> Batch:
        """Rows about one picture of at most ``most`` shapes; one in four is a conversation, the others branches."""
        drawings = [self.drawing(most) for _ in range(rows)]
        packed = []
        for drawing in drawings:
            asked = self.selection(drawing)
            pack = self.packer.conversation if self.rng.random() < 1 / 4 else self.packer.branches
            packed.append(pack(asked, 1, budget))
        batch = collate(packed, self.pad, [self.picture(drawing) for drawing in drawings])
        return replace(batch, drawings=[(drawing,) for drawing in drawings])

    def selection(self, drawing: Drawing) -> list[Ask]:
        """Questions and answers in random order, those that need most practice favoured.

        Descriptions mostly come first, as they would rarely find room later; boxes are long and soon learned; and
        most counts have the answer "no", which one example teaches as well as four.
        """
        asked = questions(drawing, self.rng)
        self.rng.shuffle(asked)
        if self.rng.random() < 2 / 3:
            asked.sort(key=lambda entry: entry[2] != "describe")
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
        packed, pictures = [], []
        pairs = [(self.drawing(), self.drawing()) for _ in range(rows)]
        for pair in pairs:
            pictures.extend(self.picture(drawing) for drawing in pair)
            asks, first = [], 0
            for which, drawing in zip(("first", "second"), pair, strict=True):
                for entry in questions_of_many(drawing, which, self.rng):
                    asks.append(Ask(*entry[:2], subjects(drawing, *entry, first=first)))
                first += len(drawing.shapes)
            self.rng.shuffle(asks)
            packed.append(self.packer.branches(asks, 2, budget))
        return replace(collate(packed, self.pad, pictures), drawings=pairs)

    def no_picture(self, rows: int) -> Batch:
        """Rows without a picture: whatever is said, the answer asks for one."""
        said: list[str] = list(GREETINGS)
        while len(said) < rows:
            said.extend(question for question, _, _ in questions(self.drawing(), self.rng))
        said = self.rng.sample(said, rows)
        return collate([self.packer.branches([Ask(text, NO_PICTURE)], 0, 0) for text in said], self.pad, [])


def subjects(drawing: Drawing, question: str, answer: str, kind: str, first: int = 0) -> tuple[int, ...]:
    """Indices, from ``first`` on, of the shapes an answer speaks of; none for a count, which looks everywhere."""
    if kind == "count":
        return ()
    if kind == "describe":
        return tuple(range(first, first + len(drawing.shapes)))
    words = set(re.findall("[a-z]+", f"{question} {answer}"))
    return tuple(index for index, shape in enumerate(drawing.shapes, first) if {shape.kind, shape.colour} <= words)


# --- Model families ----------------------------------------------------------------------------------------


class Family(ABC):
    """What the training loop needs to know of one model architecture."""

    name: str
    image_size: int
    image_tokens: int
    patches: int  # along one side

    @abstractmethod
    def build(self, tokenizer: Tokenizer) -> nn.Module:
        """A model with fresh weights."""

    @abstractmethod
    def picture_embeddings(self, model: Any, pixels: Tensor) -> Tensor:
        """(N, patches * patches, H): what takes the place of the picture tokens, in reading order."""

    @abstractmethod
    def tower(self, model: Any) -> nn.Module:
        """The vision tower, which learns only in the first stage."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """What turns features of the tower into picture embeddings."""

    @abstractmethod
    def word_embeddings(self, model: Any) -> nn.Embedding:
        """The text model's input embedding (V, H)."""

    @abstractmethod
    def hidden_states(self, model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """(B, T, H) final states of the text model, and some heads' attention to the patches, (B, T, patches) each.

        The list is empty for a batch without drawings.
        """

    @abstractmethod
    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """(..., V) scores of the next token."""

    @abstractmethod
    def save(self, model: Any, tokenizer: Tokenizer, folder: Path) -> None:
        """Write every file of a published checkpoint of this family."""


CLIP: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "image_size": 64,
    "intermediate_size": 384,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "patch_size": 8,
    "projection_dim": 128,
}
LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 352,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "vocab_size": 640,  # somewhat more rows than there are tokens, as published
}


class Llava15(Family):
    """LLaVA-1.5: a CLIP tower, a two-layer projector and a Llama text model, in the llava-hf layout."""

    name = "llava15"
    image_size = CLIP["image_size"]
    patches = CLIP["image_size"] // CLIP["patch_size"]
    image_tokens = patches * patches

    def config(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """config.json as the published checkpoints write it."""
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": IGNORE,
            "image_seq_length": self.image_tokens,
            "image_token_index": tokenizer.token_to_id("<image>"),
            "model_type": "llava",
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

    def build(self, tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
        """A model with fresh weights; wider than the usual initialisation, which suits far larger models."""
        config = LlavaConfig(
            text_config=LlamaConfig(**LLAMA, initializer_range=0.05, tie_word_embeddings=False),
            vision_config=CLIPVisionConfig(**CLIP, initializer_range=0.05, initializer_factor=1.0),
            image_token_index=self.config(tokenizer)["image_token_index"],
            projector_hidden_act="gelu",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        model = LlavaForConditionalGeneration(config).float()
        # In bfloat16 on a CPU, plain products are faster than the fused attention.
        model.set_attn_implementation("eager")
        # Words must start as large as the picture embeddings they are compared with.
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
        return model

    def picture_embeddings(self, model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
        """Projected patches of the last layer but one, without the class token."""
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return model.model.multi_modal_projector(states[-2][:, 1:])

    def tower(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """The CLIP tower."""
        return model.model.vision_tower

    def projector(self, model: LlavaForConditionalGeneration) -> nn.Module:
        """The two linear layers between tower and text model."""
        return model.model.multi_modal_projector

    def word_embeddings(self, model: LlavaForConditionalGeneration) -> nn.Embedding:
        """The embedding table of the Llama model."""
        return model.model.language_model.embed_tokens

    def hidden_states(self, model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Final states of the Llama model, and how the first head of its middle layers looks at the patches."""
        states = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            pixel_values=batch.pixels,
            use_cache=False,
            output_attentions=bool(batch.drawings),
        )
        if not batch.drawings:
            return states.last_hidden_state, []
        columns = (batch.ids[0] == model.config.image_token_index).nonzero().flatten()
        return states.last_hidden_state, [states.attentions[layer][:, 0, :, columns] for layer in (1, 2)]

    def logits(self, model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
        """Scores by the output layer, which shares nothing with the input embedding."""
        return model.lm_head(hidden)

    def save(self, model: LlavaForConditionalGeneration, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the folder under the published tensor names, weights in float16."""
        weights = {published_name(name): value for name, value in model.state_dict().items()}
        half = {name: weights[name].to(torch.float16).contiguous() for name in sorted(weights)}
        save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable to its owner only
        write_json(folder / "config.json", self.config(tokenizer))
        write_tokenizer_files(tokenizer, folder)
        write_json(folder / "preprocessor_config.json", image_settings(self.image_size))
        processor = {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": CLIP["patch_size"],
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        }
        write_json(folder / "processor_config.json", processor)
        write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


FAMILIES: dict[str, Callable[[], Family]] = {Llava15.name: Llava15}


def published_name(name: str) -> str:
    """The published name of a tensor, from the name transformers gives it in memory."""
    if name.startswith("lm_head."):
        return "language_model." + name
    name = name.removeprefix("model.")
    part, rest = name.split(".", 1)
    inner = {"language_model": "model.", "vision_tower": "vision_model."}.get(part, "")
    return f"{part}.{inner}{rest.removeprefix(inner)}"


def image_settings(image_size: int) -> dict[str, Any]:
    """preprocessor_config.json of a CLIP picture processor."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and its companions, and generation_config.json, which names the same special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(text)): {"content": text, **flags, "special": True}
        for text in ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": added,
        **names,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": int(1e30),
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {key: {"content": text, **flags} for key, text in names.items()})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.token_to_id("<pad>")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with sorted keys and a final line break."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- Training ----------------------------------------------------------------------------------------------


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
    extra_every: int = 5  # every so many steps, also two pictures and none


# What a patch is asked for: shape, colour, and left, top, right, bottom of its box.
PATCH_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, *[GRID + 1] * 4)


def patches_under(shape: Shape, patches: int) -> np.ndarray:
    """(patches, patches) bool: the patches whose middle lies in the box of a shape."""
    middles = (np.arange(patches) + 0.5) * GRID / patches
    columns = (middles >= shape.left) & (middles <= shape.left + shape.size)
    rows = (middles >= shape.top) & (middles <= shape.top + shape.size)
    return rows[:, None] & columns


def patch_targets(drawings: Sequence[Drawing], patches: int) -> Tensor:
    """(N, patches * patches, 6): shape, colour and box of the shape under each patch; 0, 0, IGNORE where none."""
    targets = np.zeros((len(drawings), patches, patches, len(PATCH_CLASSES)), dtype=np.int64)
    targets[..., 2:] = IGNORE
    for index, drawing in enumerate(drawings):
        for shape in drawing.shapes:
            named = SHAPES.index(shape.kind) + 1, tuple(COLOURS).index(shape.colour) + 1
            box = shape.left, shape.top, shape.left + shape.size, shape.top + shape.size
            targets[index, patches_under(shape, patches)] = (*named, *box)
    return torch.from_numpy(targets.reshape(len(drawings), patches * patches, -1))


def patch_owners(rows: Sequence[tuple[Drawing, ...]], patches: int) -> Tensor:
    """(B, D * patches * patches): the index of the shape under each patch of the D drawings of a row, or -1."""
    owners = np.full((len(rows), len(rows[0]), patches, patches), -1)
    for row, drawings in enumerate(rows):
        shapes = ((column, shape) for column, drawing in enumerate(drawings) for shape in drawing.shapes)
        for index, (column, shape) in enumerate(shapes):
            owners[row, column, patches_under(shape, patches)] = index
    return torch.from_numpy(owners.reshape(len(rows), -1))


class PatchProbe(nn.Module):
    """Reads shape, colour and box off each picture embedding.

    The scores of shapes and colours are products with the embeddings of their words, so that a picture of
    something red comes to resemble the word "red", as it does in a tower that was trained on captions. The text
    model then finds what it is asked for much sooner. The rest of the probe is thrown away.
    """

    def __init__(self, words: nn.Embedding, packer: Packer) -> None:
        super().__init__()
        self.words = words
        names = (SHAPES, tuple(COLOURS))
        self.rows = [torch.tensor([packer.id_of("▁" + word) for word in group]) for group in names]
        self.nothing = nn.Linear(words.embedding_dim, len(names))
        self.box = nn.Linear(words.embedding_dim, sum(PATCH_CLASSES[2:]))

    def forward(self, embeddings: Tensor) -> list[Tensor]:
        """Scores (M, classes) for each entry of PATCH_CLASSES, from embeddings (M, H)."""
        nothing = self.nothing(embeddings).split(1, dim=-1)
        named = [
            torch.cat((none, embeddings @ self.words.weight[rows].T), dim=-1)
            for none, rows in zip(nothing, self.rows, strict=True)
        ]
        return [*named, *self.box(embeddings).split(PATCH_CLASSES[2:], dim=-1)]


def train_vision(family: Family, model: nn.Module, data: Data, schedule: Schedule) -> None:
    """Teach the picture embeddings first: each patch names its shape, colour and box.

    Picture tokens are far cheaper than sentences, so this reaches useful embeddings in a fraction of the time.
    """
    probe = PatchProbe(family.word_embeddings(model), data.packer)
    learner = Learner([family.tower(model), family.projector(model), probe], schedule.rate, schedule.vision_steps)
    bar = tqdm(range(schedule.vision_steps), desc="vision", file=sys.stderr)
    for step in bar:
        drawings, pixels = data.scenes(schedule.vision_batch, 1 + 6 * step // schedule.vision_steps)
        targets = patch_targets(drawings, family.patches).flatten(0, 1)
        with half_precision():
            scores = probe(family.picture_embeddings(model, pixels).flatten(0, 1))
        losses = [cross_entropy(score.float(), targets[:, i], ignore_index=IGNORE) for i, score in enumerate(scores)]
        learner.step(torch.stack(losses).sum())
        if step % 20 == 0:
            bar.set_postfix_str(" ".join(f"{loss.item():.2f}" for loss in losses))


def train_language(family: Family, model: nn.Module, data: Data, schedule: Schedule) -> None:
    """Teach projector and text model to answer; only the answers count, and the vision tower stays as it is.

    The first quarter of the steps goes from drawings of one shape to drawings of four. While an answer speaks
    of a shape, some heads are also told to look at its patches: left to itself, a model this small learns what a
    picture holds at once, but takes very long to find out which colour belongs to which shape.
    """
    family.tower(model).requires_grad_(False)
    learner = Learner([model], schedule.rate, schedule.steps)
    bar = tqdm(range(schedule.steps), desc="language", file=sys.stderr)
    shown = 0.0
    for step in bar:
        most = 1 + 12 * step // schedule.steps
        batch = data.one_picture(schedule.batch, schedule.budget, most)
        loss, guide = answer_loss(family, model, batch)
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        bar.set_postfix_str(f"loss {shown:.3f} guide {guide.item():.3f}")
        if step % schedule.extra_every == schedule.extra_every - 1:
            two = answer_loss(family, model, data.two_pictures(schedule.batch // 2, schedule.budget // 2))
            none = answer_loss(family, model, data.no_picture(schedule.batch // 2))
            loss, guide = loss + two[0] + none[0] / 4, guide + two[1]
        learner.step(loss + schedule.guide * guide)


def answer_loss(family: Family, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the answer tokens, and the guide: how little some heads look where they should."""
    wanted = batch.targets != IGNORE
    with half_precision():
        hidden, glances = family.hidden_states(model, batch)
        logits = family.logits(model, hidden[wanted])
    loss = cross_entropy(logits.float(), batch.targets[wanted])
    if not glances:
        return loss, torch.zeros(())
    about = batch.looks != IGNORE
    owners = patch_owners(batch.drawings, family.patches)
    right = owners[about.nonzero()[:, 0]] == batch.looks[about][:, None]  # (tokens, patches)
    shares = [(glance[about].float() * right).sum(-1) for glance in glances]
    return loss, torch.stack([-torch.log(share + 1e-6).mean() for share in shares]).mean()


def half_precision() -> torch.autocast:
    """bfloat16 products: several times faster on current processors, and exact enough to learn by."""
    return torch.autocast("cpu", torch.bfloat16)


class Learner:
    """Muon for the matrices inside the layers, AdamW for all else, with a warm-up and a cosine to a fiftieth.

    Muon finds the way from words to patches in a fraction of the steps that AdamW alone needs.
    """

    def __init__(self, parts: Sequence[nn.Module], rate: float, steps: int) -> None:
        tables = {id(part.weight) for whole in parts for part in whole.modules() if isinstance(part, nn.Embedding)}
        named = {name: weight for part in parts for name, weight in part.named_parameters() if weight.requires_grad}
        inner = [w for name, w in named.items() if w.ndim == 2 and id(w) not in tables and "lm_head" not in name]
        known = {id(weight) for weight in inner}
        outer = [weight for weight in named.values() if id(weight) not in known]
        self.weights = inner + outer
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=10 * rate, weight_decay=0.01),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        warm = max(1, min(50, steps // 10))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        self.paces = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in self.optimisers]

    def step(self, loss: Tensor) -> None:
        """One update."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with_gradient = [weight for weight in self.weights if weight.grad is not None]
        nn.utils.clip_grad_norm_(with_gradient, 1.0)
        for optimiser, pace in zip(self.optimisers, self.paces, strict=True):
            optimiser.step()
            pace.step()


def train(family: Family, out: Path, seed: int, schedule: Schedule) -> None:
    """Train from scratch and leave the finished folder at ``out``."""
    began, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed)
    model = family.build(tokenizer)
    data = Data(Packer(tokenizer, family.image_tokens), family.image_size, seed)
    model.train()
    train_vision(family, model, data, schedule)
    train_language(family, model, data, schedule)
    replace_folder(out, lambda folder: family.save(model.eval(), tokenizer, folder))
    count = sum(weight.numel() for weight in model.parameters())
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {count:,} parameters, {size / 1e6:.2f} MB")
    print(f"trained in {(time.perf_counter() - began) / 60:.1f} minutes, {(time.process_time() - cpu) / 60:.1f} of CPU")


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside ``out`` and rename it, keeping a model card that is already there."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        write(beside)
        if (out / "README.md").exists():
            shutil.copy2(out / "README.md", beside / "README.md")
        if out.exists():
            shutil.rmtree(out)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# --- Evaluation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One question to a finished checkpoint: the turns before it, the pictures, and the right answer."""

    kind: str
    pictures: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]
    question: str
    answer: str


def cases(drawings: int, seed: int = HELD_OUT_SEED) -> Iterator[Case]:
    """Held-out questions: per drawing one of each kind, and a later turn; per pair one about either picture."""
    for index in range(drawings):
        rng = random.Random(seed + index)
        drawing = make_drawing(rng)
        picture = (render(drawing, rng.choice((64, 96, 128, 224, 336, 480, 640))),)
        asked = questions(drawing, rng)
        rng.shuffle(asked)
        for kind in KINDS:
            found = next(((q, a) for q, a, k in asked if k == kind), None)
            if found:
                yield Case(kind, picture, (), *found)
        yield Case("later turn", picture, tuple((q, a) for q, a, _ in asked[1:3]), *asked[0][:2])
        if index % 4 == 0:
            other = make_drawing(rng)
            which = rng.choice(("first", "second"))
            question, answer, _ = questions_of_many((drawing, other)[which == "second"], which, rng)[0]
            yield Case("two pictures", (picture[0], render(other, 128)), (), question, answer)
            yield Case("no picture", (), (), rng.choice((asked[0][0], rng.choice(GREETINGS))), NO_PICTURE)


def messages(case: Case) -> list[dict[str, Any]]:
    """The conversation of a case as chat messages, pictures in the first."""
    result: list[dict[str, Any]] = []
    for question, answer in case.turns:
        result.append({"role": "user", "content": [{"type": "text", "text": question}]})
        result.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    result.append({"role": "user", "content": [{"type": "text", "text": case.question}]})
    result[0]["content"][:0] = [{"type": "image"} for _ in case.pictures]
    return result


def evaluate(folder: Path, drawings: int, batch: int = 128) -> dict[str, dict[str, float]]:
    """Share of right answers per kind, by greedy decoding with transformers in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    # Rows of similar length and the same number of pictures share a batch, so that little is padding.
    todo = sorted(cases(drawings), key=lambda case: (len(case.pictures), len(case.turns), case.kind))
    scores: dict[str, list[tuple[Case, str]]] = {}
    for start in tqdm(range(0, len(todo), batch), desc="evaluate", file=sys.stderr):
        part = todo[start : start + batch]
        for many in {len(case.pictures) for case in part}:
            alike = [case for case in part if len(case.pictures) == many]
            for case, text in zip(alike, answers(processor, model, alike), strict=True):
                scores.setdefault(case.kind, []).append((case, text))
    return {kind: grade(found) for kind, found in scores.items()}


@torch.inference_mode()
def answers(processor: Any, model: Any, part: Sequence[Case]) -> list[str]:
    """What the model says to each case."""
    prompts = [processor.apply_chat_template(messages(case), add_generation_prompt=True) for case in part]
    pictures = [picture for case in part for picture in case.pictures]
    inputs = processor(images=pictures or None, text=prompts, padding=True, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=80)
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def grade(found: Sequence[tuple[Case, str]]) -> dict[str, float]:
    """Number of cases, share word for word, and for boxes also the overlap."""
    result: dict[str, float] = {
        "cases": len(found),
        "exact": sum(case.answer == text.strip() for case, text in found) / len(found),
    }
    boxes = [(parse_box(case.answer), parse_box(text)) for case, text in found if parse_box(case.answer)]
    if boxes:
        overlaps = [iou(right, said) if right and said else 0.0 for right, said in boxes]
        result["iou"] = sum(overlaps) / len(overlaps)
        result["iou>=0.75"] = sum(overlap >= 0.75 for overlap in overlaps) / len(overlaps)
    return result


def report(scores: dict[str, dict[str, float]]) -> str:
    """The scores as a Markdown table."""
    lines = ["| kind | cases | word for word | IoU >= 0.75 | mean IoU |", "|---|---:|---:|---:|---:|"]
    for kind, score in scores.items():
        good, mean = (f"{100 * score['iou>=0.75']:.1f} %", f"{score['iou']:.3f}") if kind == "box" else ("", "")
        lines.append(f"| {kind} | {score['cases']:.0f} | {100 * score['exact']:.1f} % | {good} | {mean} |")
    return "\n".join(lines)


# --- Command line ------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m staticvl.tools.train_tiny",
        description="Train a miniature vision-language model on drawings of shapes, or measure one.",
        epilog="examples:\n"
        "  python -m staticvl.tools.train_tiny --out tiny_llava15\n"
        "  python -m staticvl.tools.train_tiny --out quick --vision-steps 200 --steps 50\n"
        "  python -m staticvl.tools.train_tiny --evaluate tiny_llava15 --drawings 600",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Schedule()
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="DIR", help="train, and write the checkpoint folder DIR")
    task.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the checkpoint folder DIR")
    parser.add_argument("--family", choices=sorted(FAMILIES), default=Llava15.name, help="model family to train")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training drawings (default: 0)")
    parser.add_argument("--vision-steps", type=int, default=default.vision_steps, help="steps for the vision tower")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps for the whole model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--drawings", type=int, default=600, help="held-out drawings to measure on (default: 600)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or measure, as the command line says."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if options.evaluate:
        print(report(evaluate(options.evaluate, options.drawings)))
    else:
        schedule = Schedule(vision_steps=options.vision_steps, steps=options.steps)
        train(FAMILIES[options.family](), options.out, options.seed, schedule)


if __name__ == "__main__":
    main()
