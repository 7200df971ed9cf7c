"""A LoRA adapter as peft saves it, merged into a checkpoint while that is read: W + scale * B @ A, in float32."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..model_defs.config import ConfigError, ModelConfig, irregular, parse_object
from ..runtime.shown import quoted
from .source import Source, open_file
from .tensors import FLOATS, SourceTensor, WeightsError
from .weight_map import published_names
from .wrappers import unwrapped

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<role>lora_A|lora_B|base_layer)(?:\.default)?\.weight")
_MERGE_FIRST = "merge the adapter into the checkpoint with peft's merge_and_unload and compile that"
# Keys of adapter_config.json that merging uses, and those that only describe the training. fan_in_fan_out is for
# layers that store their weights transposed, which no supported model has; peft passes over it for all others.
_USED = frozenset("peft_type r lora_alpha use_rslora rank_pattern alpha_pattern bias init_lora_weights".split())
_INERT = frozenset(
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size revision runtime_config target_modules task_type""".split()
)
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the model's own weights alone


@dataclass(frozen=True, slots=True)
class _Pair:
    """The adapter of one weight, as names in the adapter's file: A [r, in] and B [out, r].

    `base`: the copy of an adapted lm_head that peft saves, which then takes the place of the checkpoint's.
    """

    a: str
    b: str
    base: str | None
    scale: float


class AdaptedSource(Source):
    """A checkpoint with an adapter: adapted weights are read with the adapter added, in float32."""

    def __init__(self, base: Source, adapter: Source, pairs: Mapping[str, _Pair]) -> None:
        """`pairs`: name of a tensor in `base` -> its adapter."""
        merged = {name: replace(base.tensors[name], dtype="float32") for name in pairs}
        super().__init__(base.tensors | merged, [*base.files, *adapter.files])
        self._base, self._adapter, self._pairs = base, adapter, dict(pairs)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that the adapter changes."""
        return tuple(self._pairs)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As Source.read. Raises WeightsError for an adapter whose values are not finite, too."""
        if name not in self._pairs:
            return self._base.read(name, rows)
        pair = self._pairs[name]
        weight = self._adapter.read(pair.base, rows) if pair.base else self._base.read(name, rows)
        a, b = self._factor(pair.a), self._factor(pair.b, rows)
        return weight.float().addmm_(b, a, alpha=pair.scale)

    def _factor(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        factor = self._adapter.read(name, rows).float()
        if not factor.isfinite().all():
            file = self._adapter.tensors[name].file
            raise WeightsError(f"{file}: tensor {name} holds values that are not finite; fetch the file again")
        return factor


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The files of the adapter in `folder`: its settings and its weights.

    Raises WeightsError when one is missing, and for an adapter of LLaVA's own training code, which keeps more than LoRA.
    """
    settings = folder / _CONFIG
    if reason := irregular(folder):
        raise WeightsError(reason)
    if not settings.is_file():
        raise WeightsError(f"{folder} holds no {_CONFIG}; expected the folder of a LoRA adapter as peft saves it")
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise WeightsError(f"{folder} holds neither {' nor '.join(_WEIGHTS)}; fetch the adapter's weights into this folder")
    if (more := folder / "non_lora_trainables.bin").is_file():
        raise WeightsError(f"{more} holds trained weights beside the adapter, which are not merged here; {_MERGE_FIRST}")
    return settings, weights


def open_adapter(folder: Path, config: ModelConfig, source: Source) -> AdaptedSource:
    """`source`, a checkpoint of `config`, with the adapter in `folder` merged into the tensors read from it.

    The modules of an adapter may be spelled as in any form of the family's checkpoints. Raises WeightsError for an adapter
    that is more than low-rank factors of linear layers, and unless each of its tensors has its place and shape.
    """
    path, file = adapter_files(folder)
    settings, adapter = _read_settings(path), open_file(file)
    published = published_names(config)
    weights = {published[name]: tensor for name, tensor in source.tensors.items() if name in published}
    pairs: dict[str, _Pair] = {}
    for module, roles in _modules(adapter).items():
        name = published.get(f"{module}.weight")
        if name is None or name not in weights:
            raise WeightsError(
                f"{file} adapts {module}, which {'is not in the checkpoint' if name else 'this model does not have'}; expected "
                f"an adapter that was trained on a {config.family} model of these sizes"
            )
        weight = weights[name]
        if weight.name in pairs:
            raise WeightsError(f"{file} adapts {module} twice, under another spelling too; keep one of them")
        pairs[weight.name] = _pair(settings, path, module, roles, weight)
    if not pairs:
        raise WeightsError(f"{file} holds no tensors; fetch the adapter again")
    return AdaptedSource(source, adapter, pairs)


def _modules(adapter: Source) -> dict[str, dict[str, SourceTensor]]:
    """Module -> its tensors by role: lora_A, lora_B, perhaps base_layer."""
    modules: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in adapter.tensors.items():
        if "lora_embedding" in name:
            raise WeightsError(f"{tensor.file}: {name} adapts an embedding, which is not supported; {_MERGE_FIRST}")
        key = _KEY.fullmatch(unwrapped(name, ("module.",)))
        if key is None:
            raise WeightsError(
                f"{tensor.file}: {name} is not one of a linear layer's low-rank factors, base_model.model.MODULE.lora_A.weight "
                f"and lora_B; {_MERGE_FIRST}"
            )
        roles = modules.setdefault(key["module"], {})
        if key["role"] in roles:
            other = roles[key["role"]].name
            raise WeightsError(f"{tensor.file} holds {name} and {other}, which mean the same; keep one of them")
        roles[key["role"]] = tensor
    return modules


def _pair(
    settings: Mapping[str, Any], path: Path, module: str, roles: Mapping[str, SourceTensor], weight: SourceTensor
) -> _Pair:
    """The tensors of one module, with their shapes checked."""
    file = next(iter(roles.values())).file
    missing = [role for role in ("lora_A", "lora_B") if role not in roles]
    if missing:
        raise WeightsError(f"{file} lacks {missing[0]} of {module}; fetch the adapter again")
    if len(weight.shape) != 2:
        raise WeightsError(f"{file} adapts {module}, which is not a linear layer; {_MERGE_FIRST}")
    rank, scale = _scale(settings, path, module)
    out, columns = weight.shape
    shapes = {"lora_A": (rank, columns), "lora_B": (out, rank), "base_layer": weight.shape}
    for role, tensor in roles.items():
        if tensor.shape != shapes[role]:
            raise WeightsError(
                f"{file}: {tensor.name} is {list(tensor.shape)}, expected {list(shapes[role])} for rank {rank} and a weight of "
                f"{list(weight.shape)}; expected an adapter that was trained on this model"
            )
        if tensor.dtype not in FLOATS:
            raise WeightsError(f"{file}: {tensor.name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    base = roles.get("base_layer")
    return _Pair(roles["lora_A"].name, roles["lora_B"].name, base.name if base else None, scale)


def _scale(settings: Mapping[str, Any], path: Path, module: str) -> tuple[int, float]:
    """Rank and scale of a module: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora; patterns name exceptions."""
    rank = _by_pattern(settings, path, "rank_pattern", module, settings.get("r", 8))
    alpha = _by_pattern(settings, path, "alpha_pattern", module, settings.get("lora_alpha", 8))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise WeightsError(f"{path}: the rank of {module} is {quoted(rank)}; expected a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise WeightsError(f"{path}: lora_alpha of {module} is {quoted(alpha)}; expected a number")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(settings: Mapping[str, Any], path: Path, name: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as peft chooses it."""
    for pattern, value in (settings.get(name) or {}).items():
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        except re.error as error:
            raise WeightsError(f"{path}: {name} has {quoted(pattern)}, which is not a regular expression ({error})") from error
    return default


def _read_settings(path: Path) -> dict[str, Any]:
    """adapter_config.json, refused when it says anything that changes the result and is not done here."""
    try:
        settings = parse_object(path.read_bytes(), path)
    except ConfigError as error:
        raise WeightsError(str(error)) from error
    if settings.get("peft_type") != "LORA":
        raise WeightsError(
            f"{path}: peft_type is {quoted(settings.get('peft_type'))}; only 'LORA' is supported: {_MERGE_FIRST}"
        )
    if settings.get("bias", "none") != "none":
        raise WeightsError(f"{path}: bias is {quoted(settings['bias'])}; only 'none' is supported: {_MERGE_FIRST}")
    start = settings.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise WeightsError(f"{path}: init_lora_weights {quoted(start)} changes the model's own weights; {_MERGE_FIRST}")
    for name, value in settings.items():
        if name not in _USED | _INERT and value:
            raise WeightsError(f"{path}: {name} is {value!r:.80}, which is not supported; {_MERGE_FIRST}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise WeightsError(f"{path}: {name} is {settings[name]!r:.80}; expected an object of patterns and numbers")
    return settings
