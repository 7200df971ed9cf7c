"""The quantisation of a checkpoint's linear layers, from its settings alone. Only the standard library is used here.

    compressed-tensors   quantization_config of config.json, of older files compression_config, as llm-compressor writes it
    GPTQ                 the same key, or quantize_config.json (AutoGPTQ, GPTQModel)
    AWQ                  the same key, or quant_config.json (AutoAWQ)

https://github.com/vllm-project/compressed-tensors, https://github.com/ModelCloud/GPTQModel,
https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...model_defs.config import ASYMMETRIC, QUANTISATION_KEYS, ConfigError, read_json
from ...model_defs.config.quant import FLOAT_HEAD, SMALL_BLOCKS
from ...runtime.shown import quoted

READ = "int8 and int4 of compressed-tensors (W8A8, W8A16, W4A16), GPTQ with 4 or 8 bits, and AWQ in its layout gemm"
REMEDY = f"supported are {READ}: give one of these or the unquantised checkpoint"
SETTINGS_FILES = {  # where older tools keep them
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


@dataclass(frozen=True, slots=True)
class Packing:
    """The packing of all quantised layers of a checkpoint.

    `group`: weights of a row with one scale; 0: the whole row. `activations`: activations are rounded to 8 bits too, token by
    token. `zero_shift` is added to each stored zero point.
    """

    method: Literal["compressed-tensors", "gptq", "awq"]
    bits: Literal[4, 8]
    group: int
    symmetric: bool
    activations: bool = False
    zero_shift: int = 0

    @property
    def quant(self) -> str:
        """The quantisation of an artifact made from it, one of READY_MADE. Raises ConfigError where there is none."""
        if self.group % 32:
            raise ConfigError(
                f"the checkpoint is quantised in groups of {self.group}; expected a multiple of 32: compile with --quant none, "
                "which stores it dequantised"
            )
        if self.activations:
            return f"w8a8{FLOAT_HEAD}"
        block = "" if self.group % 128 == 0 else SMALL_BLOCKS
        return f"w{self.bits}a16{block}{'' if self.symmetric else ASYMMETRIC}{FLOAT_HEAD}"


def read_packing(checkpoint: Path) -> Packing | None:
    """The quantisation of the checkpoint in this folder; None: it is not quantised, or has no settings that say so.

    Raises ConfigError for damaged settings and for unsupported ones.
    """
    path = checkpoint / "config.json"
    settings = read_json(path)
    quantisation = next((settings[key] for key in QUANTISATION_KEYS if settings.get(key) is not None), None)
    method = None
    if quantisation is None:
        file = next((name for name in SETTINGS_FILES if (checkpoint / name).is_file()), None)
        if file is None:
            return None
        path, method = checkpoint / file, SETTINGS_FILES[file]
        quantisation = read_json(path)
    if not isinstance(quantisation, dict):
        raise ConfigError(f"{path}: quantization_config is {type(quantisation).__name__}; expected an object")
    return _Reader(quantisation, str(path)).packing(method)


class _Reader:
    """One object of settings; every refusal names its file."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def packing(self, method: str | None) -> Packing:
        method = self.data.get("quant_method", method)
        if method is None and "config_groups" in self.data:
            method = "compressed-tensors"
        readers = {"compressed-tensors": self._compressed, "gptq": self._gptq, "awq": self._awq}
        if not isinstance(method, str) or method not in readers:
            raise ConfigError(
                f"{self.where}: quant_method of the quantisation is {quoted(method)}, which is not supported; {REMEDY}"
            )
        return readers[method]()

    def _only(self, name: str, value: Any, *allowed: Any) -> Any:
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ConfigError(f"{self.where}: {name} of the quantisation is {quoted(value)}, expected {expected}; {REMEDY}")
        return value

    def _group(self, value: Any) -> int:
        """The size of a group; -1 and None stand for a whole row."""
        if value in (None, -1):
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.where}: group_size of the quantisation is {quoted(value)}; expected a positive integer or -1"
            )
        return value

    def _gptq(self) -> Packing:
        data = self.data
        self._only("is_marlin_format", data.get("is_marlin_format", False), False)
        for name in ("adapter", "rotation"):  # more than quantised weights
            self._only(name, data.get(name) or None, None)
        form = self._only("checkpoint_format", data.get("checkpoint_format") or data.get("format") or "gptq", "gptq", "gptq_v2")
        return Packing(
            method="gptq",
            bits=self._only("bits", data.get("bits"), 4, 8),
            group=self._group(data.get("group_size")),
            symmetric=self._only("sym", data.get("sym", True), True, False),
            zero_shift=1 if form == "gptq" else 0,  # the first form stores zero points less one
        )

    def _awq(self) -> Packing:
        data = self.data
        version = data.get("version") or data.get("checkpoint_format") or data.get("format") or "gemm"
        self._only("version", str(version).lower(), "gemm")
        self._only("backend", data.get("backend", "autoawq"), "autoawq")
        self._only("zero_point", data.get("zero_point", True), True)
        bits = self._only("bits", data.get("bits", data.get("w_bit", 4)), 4)
        return Packing("awq", bits, self._group(data.get("group_size", data.get("q_group_size", 128))), symmetric=False)

    def _compressed(self) -> Packing:
        data = self.data
        for name in ("kv_cache_scheme", "transform_config"):
            self._only(name, data.get(name) or None, None)
        sparsity = data.get("sparsity_config") or {}
        self._only("sparsity_config's format", sparsity.get("format", "dense"), "dense")
        groups = data.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
            raise ConfigError(f"{self.where}: config_groups of the quantisation is {groups!r:.80}; expected groups of layers")
        first, *others = [self._scheme(each) for each in groups.values()]
        if any(each != first for each in others):
            raise ConfigError(
                f"{self.where}: config_groups quantise layers in different ways, but an artifact has one way for all "
                "layers; give a checkpoint with one group or the unquantised one"
            )
        return first

    def _scheme(self, group: Mapping[str, Any]) -> Packing:
        form = group.get("format") or self.data.get("format")
        self._only("format", form, "int-quantized", "pack-quantized", "naive-quantized")
        self._only("output_activations", group.get("output_activations"), None)
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        self._only("weights' type", weights.get("type", "int"), "int")
        bits = self._only("weights' num_bits", weights.get("num_bits"), 4, 8)
        strategy = self._only("weights' strategy", weights.get("strategy"), "group", "channel")
        symmetric = self._only("weights' symmetric", weights.get("symmetric", True), True, False)
        if inputs is not None:
            self._rounded(weights, inputs)
        return Packing(
            method="compressed-tensors",
            bits=bits,
            group=self._group(weights.get("group_size")) if strategy == "group" else 0,
            symmetric=symmetric,
            activations=inputs is not None,
        )

    def _rounded(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Check that integer products are possible: 8 bits, symmetric, a scale for each row of the weight and each token."""
        self._only("weights' num_bits, beside rounded activations,", weights.get("num_bits"), 8)
        self._only("weights' strategy, beside rounded activations,", weights.get("strategy"), "channel")
        self._only("weights' symmetric, beside rounded activations,", weights.get("symmetric", True), True)
        for name, default, expected in (
            ("num_bits", 8, 8), ("type", "int", "int"), ("symmetric", True, True), ("dynamic", False, True),
            ("strategy", None, "token"),
        ):  # fmt: skip
            self._only(f"input_activations' {name}", inputs.get(name, default), expected)
