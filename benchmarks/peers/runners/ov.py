"""OpenVINO: the decoder as exported by optimum-intel, with its cache inside; tower and projector as converted by openvino."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from ..sizes import Size
from ..text_checkpoint import text_checkpoint
from .base import Tokens, UnsupportedError, normalised

VERSIONS = ("openvino", "optimum-intel", "nncf")
TOWER = "tower.xml"


def prepare(checkpoint: Path, home: Path, weights: str, size: Size) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    if (home / "openvino_model.xml").is_file():
        return
    partial = home.with_name(f"{home.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    bits: dict[str, Any] = {"bits": 8, "sym": False} if weights == "int8" else {"bits": 4, "sym": True, "group_size": 128}
    model = OVModelForCausalLM.from_pretrained(
        text_checkpoint(checkpoint), export=True, compile=False, quantization_config=OVWeightQuantizationConfig(**bits)
    )
    model.save_pretrained(partial)
    _tower(checkpoint, partial / TOWER)
    partial.rename(home)


def _tower(checkpoint: Path, out: Path) -> None:
    """Pixels float32 [1, 3, S, S] -> rows; weights in 8 bits, openvino's usual choice, would be no fair tower: they stay."""
    import torch
    from transformers import AutoModelForImageTextToText

    kind: Any = AutoModelForImageTextToText
    model: Any = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
    side = model.config.vision_config.image_size

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
            return self.projector(hidden[:, 1:])

    pixels = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        converted = openvino.convert_model(Tower(), example_input=pixels, input=[list(pixels.shape)])
    openvino.save_model(converted, out)  # in float16


class OpenvinoRunner:
    """See base.Runner."""

    def __init__(self, checkpoint: Path, home: Path, weights: str, size: Size, threads: int) -> None:
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.core, self.settings, self.home = core, settings, home
        self.model = core.compile_model(home / "openvino_model.xml", "CPU", settings)
        self.request = self.model.create_infer_request()
        self.tower: Any = None
        self.names = {name for port in self.model.inputs for name in port.get_names()}
        self.length, self.rows = 0, np.empty(0)

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        self.request.reset_state()
        self.length = 0
        self._run(np.array(prompts, np.int64))

    def step(self) -> None:
        self._run(self.rows.argmax(-1)[:, None])

    def last(self) -> np.ndarray:
        return np.array(self.rows[0], np.float32)

    def image(self, pixels: np.ndarray) -> None:
        if self.tower is None:
            self.tower = self.core.compile_model(self.home / TOWER, "CPU", self.settings).create_infer_request()
        self.tower.infer([normalised(pixels)])

    def prefill_image(self, pixels: np.ndarray, prompt: Tokens) -> None:
        raise UnsupportedError("its decoder takes token ids only")

    def _run(self, ids: np.ndarray) -> None:
        rows, count = ids.shape
        positions = np.arange(self.length, self.length + count)
        self.length += count
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, self.length), np.int64),
            "position_ids": np.tile(positions, (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in inputs.items() if name in self.names})
        self.rows = self.request.get_tensor("logits").data[:, -1]


OPEN = OpenvinoRunner
