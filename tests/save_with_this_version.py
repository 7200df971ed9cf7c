"""Run by the Python of another version of transformers: reads a tiny checkpoint, fills it with random weights, saves it anew.

    python save_with_this_version.py FAMILY FOLDER OUT [processor]

Config, generation config and weights are written as that version's save_pretrained does it; with "processor" the files of
tokenizer and image processor too.
"""

from __future__ import annotations

import sys

import torch
import transformers

MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}


def main(family: str, folder: str, out: str, processor: str = "") -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, MODELS[family])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    model.save_pretrained(out)
    if processor:
        transformers.AutoProcessor.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
