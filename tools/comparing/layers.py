"""The comparison of a model's definition with transformers' own modules, for faults that no compiled graph can show.

Both run the same prompt over the same weights in float32. transformers' modules are hooked, ours traced, and the first module
with another output is named. RENAMES maps the names of their modules to ours.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from torch import Tensor

from ...compiler.graphs import GraphContext, define_graph
from ...compiler.tracing import module_path
from ...model_defs.config import ModelConfig
from ...runtime.artifact import GraphKey
from .capture import CapturedRun, capture
from .findings import Finding
from .hf_side import HfPrepared, HfSide
from .operator_errors import OperatorComparison
from .static_side import StaticPrepared, StaticSide
from .taps import definition, inputs_of, parameters_of

TOLERANCE = 1e-3  # float32 sums in another order, over the depth of a model

# transformers' path -> ours, tried in order.
RENAMES = (
    (r"(^|.*\.)language_model\.(model\.)?", "text."),
    (r"^lm_head$", "text.lm_head"),
    (r"(^|.*\.)multi_modal_projector", "projector"),
    (r"(^|.*\.)(vision_tower|vision_model)\.(vision_model\.)?", "vision."),
    (r"vision\.transformer\.layers", "vision.layers"),
    (r"vision\.global_transformer\.layers", "vision.global_layers"),
    (r"vision\.encoder\.layers", "vision.layers"),
    (r"vision\.(layernorm_pre|pre_layrnorm)$", "vision.pre_norm"),
    (r"vision\.layernorm_post$", "vision.post_norm"),
    (r"^projector\.linear_1$", "projector.up"),
    (r"^projector\.linear_2$", "projector.down"),
    (r"\.(self_attn|cross_attn)", ".attn"),
    (r"\.(input_layernorm|layer_norm1)$", ".attn_norm"),
    (r"\.(post_attention_layernorm|layer_norm2)$", ".mlp_norm"),
    (r"\.([qkvo])_proj$", r".\1"),
    (r"\.out_proj$", ".o"),
    (r"\.(gate|up|down)_proj$", r".\1"),
    (r"(vision\..*)\.fc1$", r"\1.up"),
    (r"(vision\..*)\.fc2$", r"\1.down"),
    (r"text\.embed_tokens$", "text.embed"),
)
_MODULE = re.compile(
    r"(text|vision)\.(global_)?layers\.\d+(\.(attn(\.([qkvo]|[qk]_norm))?|attn_norm|mlp_norm|mlp(\.(gate|up|down))?))?"
    r"|text\.(embed|norm|lm_head)|vision\.(pre_norm|post_norm)|projector(\.(up|down))?|cross\.\d+\.(k|v|k_norm)"
)


def our_name(path: str, config: ModelConfig) -> str | None:
    """Our name of a module of transformers; None where we have no such module."""
    for pattern, replacement in RENAMES:
        path = re.sub(pattern, replacement, path)
    of_cross = re.fullmatch(r"text\.layers\.(\d+)\.attn\.(k|v|k_norm)", path)
    if of_cross and int(of_cross[1]) in config.text.cross_layers:  # ours belong to the vision graph
        path = f"cross.{config.text.cross_layers.index(int(of_cross[1]))}.{of_cross[2]}"
    return path if _MODULE.fullmatch(path) else None


def compare_definition(
    eager: StaticSide, hf: HfSide, ours: StaticPrepared, theirs: HfPrepared
) -> tuple[list[Finding], dict[str, float]]:
    """The first module whose output differs, and the error of every module in transformers' order."""
    outputs = _our_modules(eager, ours)
    errors: dict[str, float] = {}
    missing: list[str] = []
    for name, value in _their_modules(hf, theirs):
        if name not in outputs:
            if not name.startswith(("vision.", "projector", "cross.")) or any(key.startswith("vision.") for key in outputs):
                missing.append(name)
            continue
        compared = _last_token(value) if outputs[name].numel() == _last_token(value).numel() else value
        if outputs[name].numel() != compared.numel():  # a run of padded tiles
            continue
        error = errors[name] = _error(compared, outputs[name])
        if error > TOLERANCE:
            absent = next((each for each in missing if each.rpartition(".")[0] == name.rpartition(".")[0]), None)
            return [_finding(absent or name, error, compared, bool(absent))], errors
    return [], errors


def _last_token(value: Tensor) -> Tensor:
    """The last row of [1, T, C], which is all that our last layer computes after its attention."""
    return value[:, -1] if value.dim() == 3 else value


def _finding(name: str, error: float, value: Tensor, absent: bool) -> Finding:
    cause = "transformers has it, the definition has not" if absent else "the same weights give another output in transformers"
    text = f"{name} {list(value.shape)}: {cause} (relative error {error:.2e})"
    return Finding(stage="definition", where=name, text=text, error=error, shape=tuple(value.shape))


def _error(a: Tensor, b: Tensor) -> float:
    """The relative error of the numbers in order, or of the sorted ones where that is less: layouts differ."""
    x, y = a.detach().float().numpy().ravel(), b.detach().float().numpy().ravel()
    scale = max(float(np.abs(x).max(initial=0)), 1e-30)
    return min(float(np.abs(x - y).max(initial=0)), float(np.abs(np.sort(x) - np.sort(y)).max(initial=0))) / scale


def _their_modules(hf: HfSide, prompt: HfPrepared) -> list[tuple[str, Tensor]]:
    """The outputs of transformers' modules, in the order in which they end."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            if isinstance(value, Tensor) and name not in outputs:
                outputs[name] = value.detach().clone()

        return keep

    handles = []
    for path, module in hf.model.named_modules():
        if name := our_name(path, hf.config):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        hf.forward(prompt, np.zeros(1, np.int64))
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs.items()]


def _our_modules(eager: StaticSide, prompt: StaticPrepared) -> dict[str, Tensor]:
    """The outputs of our modules: of the vision graph's first run, and of one prefill as long as the prompt."""
    outputs: dict[str, Tensor] = {}
    assert eager.config is not None
    answer = [np.zeros(1, np.int64)]
    for run in capture(eager, [prompt], answer, None):
        if run.graph.kind == "vision" and not any(name.startswith("vision.") for name in outputs):
            outputs |= _values(eager, run)
    outputs |= _values(eager, _whole_prefill(eager, prompt))
    return outputs


def _whole_prefill(eager: StaticSide, prompt: StaticPrepared) -> CapturedRun:
    """The prompt as one chunk: the feeds of its chunks, joined."""
    runs = [run for run in capture(eager, [prompt], [np.zeros(1, np.int64)], None) if run.graph.kind == "prefill"]
    length, first = prompt.length, runs[0]
    assert eager.config is not None
    context = GraphContext(config=eager.config, image=eager.info.image, cache=eager.artifact.manifest.cache)
    graph = define_graph(context, GraphKey("prefill", length, first.graph.images))
    feed: dict[str, np.ndarray] = {}
    for name in first.feed:
        if name == "image_rows":
            continue
        parts, remaining = [], length
        for run in runs:
            parts.append(run.feed[name][:, : min(remaining, run.graph.bucket)] if run.feed[name].ndim > 1 else run.feed[name])
            remaining -= run.graph.bucket
        feed[name] = np.concatenate(parts, axis=1) if parts[0].ndim > 1 else parts[0]
    if "image_rows" in first.feed:
        _join_rows(feed, runs, length)
    feed["last_index"] = np.array([length - 1], np.int32)
    return CapturedRun(graph.spec(), feed, first.caches, 0, 1, {0: 0}, length)


def _join_rows(feed: dict[str, np.ndarray], runs: list[CapturedRun], length: int) -> None:
    """Join the rows of images of all chunks, and the index of each position among them."""
    rows, index, remaining = [], [], length
    for run in runs:
        count = min(remaining, run.graph.bucket)
        own = run.feed["row_index"][0, :count]
        index.append(np.where(own >= 0, own + sum(map(len, rows)), -1))
        rows.append(run.feed["image_rows"][: int(own.max(initial=-1)) + 1])
        remaining -= count
    joined = np.concatenate(rows)
    feed["row_index"] = np.concatenate(index)[None].astype(np.int32)
    feed["image_rows"] = np.concatenate((joined, np.zeros((length - len(joined), joined.shape[1]), np.float32)))


def _values(eager: StaticSide, run: CapturedRun) -> dict[str, Tensor]:
    """The last value of every module of a graph."""
    assert eager.config is not None
    graph, program = definition(eager, run.graph)
    operators = OperatorComparison(program, parameters_of(eager, eager.rank_weights[0], graph))
    return by_module(operators, inputs_of(graph, run, 0, 1))


def by_module(operators: OperatorComparison, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The last value of every module, and of every module that contains it."""
    values: dict[Any, Tensor] = {}

    def keep(node: Any, expected: Tensor) -> None:
        values[node] = expected

    operators.run(inputs, keep)
    outputs: dict[str, Tensor] = {}
    for node, value in values.items():
        parts = module_path(node).split(".")
        for i in range(1, len(parts) + 1):
            outputs[".".join(parts[:i])] = value
    return outputs
