"""A side that transformers runs: a checkpoint in the layout of the hub, with its own processor, in float32."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...model_defs.config import ModelConfig
from ...runtime.artifact import Manifest
from ...runtime.processor.boxes import Box
from ...runtime.processor.image_files import load_image
from ...runtime.processor.images import Frame, frame_of
from ...runtime.processor.prompt import Message
from .checkpoint import Checkpoint
from .samples import Sample
from .sides import HIDDEN_TOKEN, Generated, Prepared, SideError

FAMILIES = ("llava", "llava_next", "mllama")


@dataclass(frozen=True, slots=True)
class HfPrepared:
    """See sides.Prepared; `tensors`: the arguments of the model."""

    side: HfSide
    tensors: dict[str, Tensor]
    frames: tuple[Frame, ...]

    @property
    def length(self) -> int:
        return self.tensors["input_ids"].shape[1]

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        tensors, mllama = self.tensors, self.side.config.family == "mllama"
        ids = tensors["input_ids"][0].numpy()
        inputs = {"token_ids": ids if mllama else np.where(ids == self.side.image_token, HIDDEN_TOKEN, ids)}
        inputs |= self.side.rope(self.length)
        if "pixel_values" in tensors:
            inputs["pixels"] = self.side.tiles(tensors).permute(0, 2, 3, 1).numpy()
        if "aspect_ratio_ids" in tensors:
            inputs["aspect_id"] = tensors["aspect_ratio_ids"][0].numpy()
            mask = tensors["cross_attention_mask"][0].flatten(1)  # [L, N * t]
            # A position that sees nothing is treated as one that sees everything, but only after this mask.
            inputs["tiles_seen"] = torch.where(mask.any(1, keepdim=True), mask, 1).long().numpy()
        return inputs

    def with_tokens(self, length: int, ids: np.ndarray) -> HfPrepared:
        more = torch.from_numpy(ids[: max(0, length - self.length)].astype(np.int64))[None]
        return HfPrepared(self.side, lengthened(self.tensors, length, more), self.frames)


class HfSide:
    """See sides.Side."""

    manifest: Manifest | None = None  # transformers compiles nothing

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        import transformers

        self.name, self.checkpoint = name, checkpoint
        self.info, self.config, self.processor = checkpoint.info, checkpoint.config, checkpoint.processor
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.hf_processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint.folder)
        kind: Any = transformers.AutoModelForImageTextToText
        self.model: Any = kind.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
        self.image_token: int = self.model.config.image_token_id

    def close(self) -> None:
        self.checkpoint.close()

    def prepare(self, sample: Sample) -> HfPrepared:
        messages = [{"role": each.role, "content": self._content(each)} for each in sample.messages]
        text = self.hf_processor.apply_chat_template(messages, add_generation_prompt=True)
        bos = self.processor.tokenizer.token(self.info.tokenizer.bos_token_id)
        images = [_processor_image(image) for image in sample.images]
        tensors = self.hf_processor(
            text=text, images=images or None, return_tensors="pt", add_special_tokens=not text.startswith(bos)
        )
        frames = tuple(frame_of(image.size, self.info.image) for image in images)
        return HfPrepared(self, dict(tensors), frames)

    def _content(self, message: Message) -> str | list[dict[str, str]]:
        """A message in the template's form; that of Llama-3.2-Vision trims a system message as one text."""
        if message.role == "system" and self.config.family == "mllama":
            return message.text
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]

    def run_forced(
        self,
        prompts: Sequence[Prepared],
        answers: Sequence[np.ndarray],
        *,
        route: dict[str, int] | None = None,
        caches: bool = False,
    ) -> list[Generated]:
        """See sides.Side. One pass over prompt and answer; `route` is ignored, as there are no buckets."""
        generated = []
        for prompt, answer in zip(prompts, answers, strict=True):
            assert isinstance(prompt, HfPrepared)
            out = self.forward(prompt, answer, caches=caches)
            logits = out.logits[0, prompt.length - 1 :].float().numpy()
            generated.append(Generated(logits, self._caches(out.past_key_values) if caches else {}))
        return generated

    def forward(self, prompt: HfPrepared, answer: np.ndarray, *, caches: bool = False) -> Any:
        """The model's outputs for the prompt and all of the answer but its last token."""
        more = torch.from_numpy(answer[:-1].astype(np.int64))[None]
        with torch.no_grad():
            return self.model(**lengthened(prompt.tensors, prompt.length + more.shape[1], more), use_cache=caches)

    def _caches(self, key_values: Any) -> dict[str, np.ndarray]:
        layers = [i for i in range(self.config.text.layers) if i not in self.config.text.cross_layers]
        caches = {}
        for place, layer in enumerate(layers):
            caches[f"k_cache.{place}"] = key_values.layers[layer].keys[0].float().numpy()
            caches[f"v_cache.{place}"] = key_values.layers[layer].values[0].float().numpy()
        return caches

    def greedy(self, prompt: Prepared, count: int) -> np.ndarray:
        assert isinstance(prompt, HfPrepared)
        ends = list(self.info.eos_token_ids)
        out = self.model.generate(
            **prompt.tensors, max_new_tokens=count, do_sample=False, temperature=None, top_p=None, top_k=None,
            eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        return out[0, prompt.length :].numpy()

    def boxes(self, text: str, prompt: Prepared) -> Sequence[Box]:
        assert isinstance(prompt, HfPrepared)
        return self.processor.boxes(text, prompt.frames)

    def rope(self, length: int) -> dict[str, np.ndarray]:
        """Rotary tables [L, D] as the model computes them."""
        places = torch.arange(length)[None]
        with torch.no_grad():
            cos, sin = self.model.model.language_model.rotary_emb(torch.zeros(1, 1, 1), places)
        return {"rope_cos": cos[0].numpy(), "rope_sin": sin[0].numpy()}

    def tiles(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Normalised pixels of the tiles that are not padding: [tiles, 3, S, S]."""
        pixels = tensors["pixel_values"]
        if self.config.family == "mllama":
            return torch.cat([pixels[0, i, : int(mask.sum())] for i, mask in enumerate(tensors["aspect_ratio_mask"][0])])
        if self.config.family == "llava_next":
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            config = self.model.config
            grids, size = config.image_grid_pinpoints, config.vision_config.image_size
            counts = [image_size_to_num_patches(sizes, grids, size) for sizes in tensors["image_sizes"].tolist()]
            return torch.cat([each[:count] for each, count in zip(pixels, counts, strict=True)])
        return pixels


def _processor_image(source: Any) -> Image.Image:
    """An image for the processor, which converts to RGB itself: a file, turned as transformers' loader does, or a PIL image.

    Grey of more than 8 bits is scaled as ours, since transformers would clip it. Raises ImageError.
    """
    loaded = load_image(source)
    source = io.BytesIO(source) if isinstance(source, bytes) else source
    image = source if isinstance(source, Image.Image) else ImageOps.exif_transpose(Image.open(source))
    return loaded if image.mode[0] in "IF" else image


def lengthened(tensors: Mapping[str, Tensor], length: int, more: Tensor) -> dict[str, Tensor]:
    """A model's inputs followed by `more` ids [1, n], cut to `length` positions."""
    changed = dict(tensors)
    changed["input_ids"] = torch.cat((tensors["input_ids"], more), dim=1)[:, :length]
    changed["attention_mask"] = torch.ones_like(changed["input_ids"])
    if "cross_attention_mask" in tensors:  # the answer sees what the last token of the prompt sees
        mask = tensors["cross_attention_mask"]
        changed["cross_attention_mask"] = torch.cat((mask, mask[:, -1:].expand(-1, more.shape[1], -1, -1)), dim=1)[:, :length]
    changed.pop("mm_token_type_ids", None)
    changed.pop("token_type_ids", None)
    return changed


def open_hf_side(checkpoint: Checkpoint, name: str) -> HfSide:
    """A checkpoint run by transformers; raises SideError for one that transformers does not support."""
    config: ModelConfig = checkpoint.config
    if config.family not in FAMILIES or config.layout != "hf":
        raise SideError(
            f"{checkpoint.folder} is {config.family} in the layout {config.layout}, which transformers cannot run; use the "
            "definitions: --reference-by eager"
        )
    return HfSide(checkpoint, name)
