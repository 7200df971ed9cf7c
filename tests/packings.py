"""Linear layers of a tiny checkpoint quantised and packed number by number, as the formats are published.

Nothing here is shared with the code that reads them: words are put together bit by bit, with Python's own integers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .checkpoints_files import write_json

LAYERS = re.compile(
    r"(?:(?:model\.)?language_model\..*layers\.\d+\.(?:self_attn|cross_attn|mlp)\.[a-z]+_proj"
    r"|transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.\w+))\.weight"
)
Numbers = np.ndarray  # whole numbers from 0 to 2^bits - 1


@dataclass(frozen=True, slots=True)
class Form:
    """A format of packed checkpoints; `group` 0: a scale for each row."""

    method: str
    bits: int
    group: int
    symmetric: bool
    version: str = ""  # gptq: checkpoint_format; compressed-tensors: format
    activations: bool = False
    scales: str = "float16"

    @property
    def settings(self) -> dict[str, Any]:
        """quantization_config as the tools write it."""
        size = self.group or -1
        if self.method == "awq":
            return {
                "quant_method": "awq", "bits": self.bits, "group_size": size, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["vision_tower"],
            }  # fmt: skip
        if self.method == "gptq":
            form = {"checkpoint_format": self.version} if self.version else {}
            return {
                "quant_method": "gptq", "bits": self.bits, "group_size": size, "sym": self.symmetric, "desc_act": False,
                "damp_percent": 0.01, "true_sequential": True, "static_groups": False, "lm_head": False, **form,
            }  # fmt: skip
        weights = {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False, "actorder": None,
            "strategy": "group" if self.group else "channel", "group_size": self.group or None, "observer": "minmax",
        }  # fmt: skip
        rounded = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "group_size": None}
        scheme = {
            "targets": ["Linear"], "weights": weights, "output_activations": None,
            "input_activations": rounded if self.activations else None,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": self.version, "quantization_status": "compressed",
            "config_groups": {"group_0": scheme}, "kv_cache_scheme": None,
            "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*vision_model.*", "re:.*multi_modal_projector.*"],
        }  # fmt: skip


FORMS = {
    "awq": Form("awq", 4, 32, symmetric=False),
    "awq-128": Form("awq", 4, 128, symmetric=False),
    "gptq": Form("gptq", 4, 32, symmetric=True),
    "gptq-64": Form("gptq", 4, 64, symmetric=True),
    "gptq-row": Form("gptq", 4, 0, symmetric=True),
    "gptq-asym": Form("gptq", 4, 32, symmetric=False, version="gptq"),
    "gptq-v2-asym": Form("gptq", 4, 32, symmetric=False, version="gptq_v2"),
    "gptq-8": Form("gptq", 8, 32, symmetric=True, version="gptq_v2"),
    "gptq-8-asym": Form("gptq", 8, 32, symmetric=False, version="gptq"),
    "w4a16": Form("compressed-tensors", 4, 32, symmetric=True, version="pack-quantized"),
    "w4a16-row": Form("compressed-tensors", 4, 0, symmetric=True, version="pack-quantized"),
    "w4a16-asym": Form("compressed-tensors", 4, 32, symmetric=False, version="pack-quantized"),
    "w8a16": Form("compressed-tensors", 8, 32, symmetric=True, version="pack-quantized"),
    "w8a16-row-asym": Form("compressed-tensors", 8, 0, symmetric=False, version="pack-quantized"),
    "w8a8": Form("compressed-tensors", 8, 0, symmetric=True, version="int-quantized", activations=True),
}


def pack_checkpoint(
    folder: Path,
    form: Form,
    *,
    chosen: Callable[[str], bool] = lambda _: True,
    order: Callable[[int], np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise the decoder's layers of a checkpoint in one file, in place; name -> what the weight is now, in float32.

    `order`: columns -> which group each is in, for gptq (g_idx); default: neighbours share one.
    """
    tensors = load_file(folder / "model.safetensors")
    dense: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if LAYERS.fullmatch(name) and chosen(name)]:
        weight = tensors.pop(name).float().numpy()
        parts, value = packed(form, weight, order(weight.shape[1]) if order else None)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": each.contiguous() for part, each in parts.items()}
        dense[name] = torch.from_numpy(value)
    assert dense
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": form.settings})
    return dense


def packed(form: Form, weight: np.ndarray, order: np.ndarray | None = None) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """weight [N, K] -> tensors of its module by their last name, and the weight [N, K] float32 that they stand for."""
    n, k = weight.shape
    size = form.group or k
    groups = np.arange(k) // size if order is None else order
    q, scales, zeros = rounded(form, weight, groups)
    dense = (q.astype(np.float32) - zeros[:, groups].astype(np.float32)) * scales[:, groups].astype(np.float32)
    scale = torch.from_numpy(scales)
    if form.method == "awq":
        by_awq = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {"qweight": words(q.T, 4, by_awq), "qzeros": words(zeros.T, 4, by_awq), "scales": scale.T}
    elif form.method == "gptq":
        largest = (1 << form.bits) - 1
        kept = zeros if form.version == "gptq_v2" else (zeros - 1) & largest
        parts = {"qweight": words(q, form.bits).T, "qzeros": words(kept.T, form.bits), "scales": scale.T}
        parts["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    elif form.version == "int-quantized":
        parts = {"weight": torch.from_numpy((q - 128).astype(np.int8)), "weight_scale": scale}
    else:
        parts = {"weight_packed": words(q, form.bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        if not form.symmetric:
            parts["weight_zero_point"] = words(zeros.T, form.bits).T
    return parts, dense


def rounded(form: Form, weight: np.ndarray, groups: np.ndarray) -> tuple[Numbers, np.ndarray, Numbers]:
    """q [N, K], scales [N, G] and zero points [N, G], group by group."""
    n, k = weight.shape
    count, largest, middle = int(groups.max()) + 1, (1 << form.bits) - 1, 1 << form.bits - 1
    q, scales, zeros = np.zeros((n, k), np.int64), np.zeros((n, count), form.scales), np.full((n, count), middle)
    for g in range(count):
        inside = weight[:, groups == g]
        low, high = np.minimum(inside.min(1), 0), np.maximum(inside.max(1), 0)
        if form.symmetric:
            scales[:, g] = np.abs(inside).max(1) / (middle - 1)
        else:
            scales[:, g] = (high - low) / largest
            zeros[:, g] = np.clip(np.rint(-low / scales[:, g].astype(np.float64)), 0, largest)
            zeros[:: n // 2, g] = 0, largest  # both ends
        steps = np.rint(inside / scales[:, g, None].astype(np.float64)) + zeros[:, g, None]
        q[:, groups == g] = np.clip(steps, 0, largest)
    return q, scales, zeros


def words(numbers: Numbers, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """[R, C] -> int32 [R, C * bits / 32]: neighbours of a row share a word; what lies at place i of it is number order[i]."""
    each = 32 // bits
    rows, columns = numbers.shape
    found = np.zeros((rows, -(-columns // each)), np.uint32)
    for r in range(rows):
        for c in range(found.shape[1]):
            word = 0
            for i in range(each):
                at = c * each + (order[i] if order else i)
                word |= (int(numbers[r, at]) if at < columns else 0) << bits * i
            found[r, c] = word
    return torch.from_numpy(found.view(np.int32))
