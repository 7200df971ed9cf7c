"""Quantised checkpoints: every number as it was packed, whatever the format, and one sentence for what cannot be stored."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.compiler.build import build
from staticvl.compiler.calibration import Calibration
from staticvl.compiler.plan import Options, PlanError
from staticvl.compiler.ready_made import resolve
from staticvl.model_defs.config import ConfigError, ModelConfig, read_config
from staticvl.runtime.backends.ascend.weights import map_weight
from staticvl.tools.comparing.checkpoint import Checkpoint
from staticvl.tools.development.random_checkpoint import main
from staticvl.weights.convert import Conversion, convert
from staticvl.weights.lora import open_adapter
from staticvl.weights.packing.settings import read_packing
from staticvl.weights.packing.source import PackedSource, check_layers, open_packed
from staticvl.weights.quantize import dequantize
from staticvl.weights.source import open_source
from staticvl.weights.storage import quant_of
from staticvl.weights.tensors import WeightsError
from staticvl.weights.weight_map import match

from .checkpoints import tiny_llava
from .packings import FORMS, pack_checkpoint
from .tiny_families import GOLDEN_QWEN

# Three blocks of 32 in most rows, an odd number; the last of another layer is not full.
SIZES = {"hidden": 96, "heads": 6, "kv_heads": 2, "intermediate": 112, "layers": 1, "vision_layers": 2}
WHOLE = SIZES | {"intermediate": 128}
WIDE = WHOLE | {"hidden": 128, "heads": 8}
QUANTS = {
    "awq": "w4a16-g32-asym", "gptq": "w4a16-g32", "gptq-64": "w4a16-g32", "gptq-row": "w4a16", "gptq-asym": "w4a16-g32-asym",
    "gptq-v2-asym": "w4a16-g32-asym", "gptq-8": "w8a16-g32", "gptq-8-asym": "w8a16-g32-asym", "w4a16": "w4a16-g32",
    "w4a16-row": "w4a16", "awq-128": "w4a16-asym", "w4a16-asym": "w4a16-g32-asym", "w8a16": "w8a16-g32",
    "w8a16-row-asym": "w8a16-asym", "w8a8": "w8a8",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, dict[str, int]], Path]:
    """Copies of a checkpoint in floating point."""
    made: dict[str, Path] = {}

    def copy(folder: Path, sizes: dict[str, int]) -> Path:
        key = str(sizes)
        if key not in made:
            made[key] = tiny_llava(tmp_path_factory.mktemp("plain") / "checkpoint", names="new", **sizes).folder
        return shutil.copytree(made[key], folder)

    return copy


Plain = Callable[[Path, dict[str, int]], Path]


def opened(folder: Path) -> tuple[PackedSource, ModelConfig]:
    packing, config = read_packing(folder), read_config(folder)
    assert packing is not None
    return open_packed(open_source(folder), packing, config), config


def converted(folder: Path, out: Path, quant: str, tp: int = 1) -> list[dict[str, Tensor]]:
    """What is stored, by rank."""
    source, config = opened(folder)
    ranks = []
    for rank in range(tp):
        made = convert(source, config, out, Conversion(quant=quant, prefix="w", tp=tp, rank=rank))
        ranks.append({name: each for file in made.files for name, each in load_file(out / file).items()})
    return ranks


def read(stored: dict[str, Tensor], name: str, quant: str, columns: int) -> Tensor:
    """A parameter as it is stored, in float32."""
    kind, stem = quant_of(name, quant), name.removesuffix(".weight")
    if kind == "none":
        return stored[name]
    names = {part: f"{stem}.{part}" for part in ("qweight", "scales", "zeros")}
    return dequantize(kind, {part: stored[each] for part, each in names.items() if each in stored}, columns)


def ours(name: str) -> str:
    """Our name of a decoder's layer."""
    layer, module = re.findall(r"layers\.(\d+)\.\w+\.(\w+)_proj", name)[0]
    return f"text.layers.{layer}.{'attn' if len(module) == 1 else 'mlp'}.{module}.weight"


@pytest.mark.parametrize("name", FORMS)
def test_every_number_is_stored_as_it_was_packed(name: str, plain: Plain, tmp_path: Path) -> None:
    form = FORMS[name]
    # GPTQ's words run along the columns, of which groups take all; compressed-tensors has room for a group that is not full.
    sizes = SIZES if form.method == "compressed-tensors" else WHOLE
    sizes = WIDE if form.group == 128 else sizes
    folder = plain(tmp_path / "checkpoint", sizes)
    dense = pack_checkpoint(folder, form)
    options, _ = resolve(Options(checkpoint=folder, out=tmp_path / "out"))
    assert options.quant == f"{QUANTS[name]}+float-head"
    (stored,) = converted(folder, tmp_path / "out", options.quant)
    for each, expected in dense.items():
        found = read(stored, ours(each), options.quant, expected.shape[1])
        assert torch.equal(found, expected), each
        assert len(expected.unique()) > 50
        filled = read(stored, ours(each), options.quant, 256)[:, expected.shape[1] :]
        assert filled.count_nonzero() == 0, "what fills up a last block stands for zero"
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(stored["text.lm_head.weight"], head), "stays as it is"
    assert {part.rpartition(".")[2] for part in stored if part.startswith("text.layers.0.mlp.down.")} == (
        {"qweight", "scales"} if form.symmetric else {"qweight", "scales", "zeros"}
    )
    (floats,) = converted(folder, tmp_path / "floats", "none")
    assert all(torch.equal(floats[ours(each)], expected) for each, expected in dense.items())


def test_fused_queries_keys_and_values(tmp_path: Path) -> None:
    """Qwen-VL-Chat-Int4's form: one packed layer and its bias make three of ours, on every rank a part of each."""
    folder = shutil.copytree(GOLDEN_QWEN, tmp_path / "checkpoint")
    dense = pack_checkpoint(folder, FORMS["gptq-asym"])
    (whole,), (first, second) = (converted(folder, tmp_path / str(tp), "w4a16-g32-asym+float-head", tp) for tp in (1, 2))
    fused = dense["transformer.h.1.attn.c_attn.weight"]
    for part, expected in zip("qkv", fused.chunk(3), strict=True):
        name = f"text.layers.1.attn.{part}.weight"
        assert torch.equal(read(whole, name, "w4a16-g32-asym", 256), expected)
        assert torch.equal(torch.cat([read(each, name, "w4a16-g32-asym", 256) for each in (first, second)]), expected)
    found = read(whole, "text.layers.0.mlp.down.weight", "w4a16-g32-asym", 128)
    assert torch.equal(found, dense["transformer.h.0.mlp.c_proj.weight"])


@pytest.mark.parametrize("name", ["awq", "w8a8", "w8a16-row-asym", "gptq-8-asym", "awq-128"])
def test_ranks_hold_their_parts(name: str, plain: Plain, tmp_path: Path) -> None:
    folder = plain(tmp_path / "checkpoint", WIDE)
    dense = pack_checkpoint(folder, FORMS[name])
    quant = resolve(Options(checkpoint=folder, out=tmp_path / "out"))[0].quant
    first, second = converted(folder, tmp_path / "out", quant, tp=2)
    for each, expected in dense.items():
        axis = 1 if each.endswith(("o_proj.weight", "down_proj.weight")) else 0
        columns = expected.shape[1] // (2 if axis else 1)
        parts = [read(rank, ours(each), quant, columns) for rank in (first, second)]
        assert torch.equal(torch.cat(parts, axis), expected), each


def test_a_cut_through_a_group_is_refused(plain: Plain, tmp_path: Path) -> None:
    """Half of 112 columns: the second rank's blocks would begin inside of groups. Stored in floating point it can be cut."""
    folder = plain(tmp_path / "checkpoint", SIZES)
    pack_checkpoint(folder, FORMS["w4a16"])
    with pytest.raises(WeightsError, match=r"several groups among 32 neighbours.* --quant none.* a number of ranks whose"):
        converted(folder, tmp_path / "out", "w4a16-g32+float-head", tp=2)
    assert len(converted(folder, tmp_path / "floats", "none", tp=2)) == 2


def test_acts_in_another_order(plain: Plain, tmp_path: Path) -> None:
    """Columns of one group that lie apart are refused before anything is made, unless they are stored in floating point."""
    folder = plain(tmp_path / "checkpoint", WHOLE)
    dense = pack_checkpoint(folder, FORMS["gptq"], order=lambda columns: np.arange(columns) % (columns // 32))
    with pytest.raises(WeightsError, match=r"act-order.* compile with --quant none"):
        build(Options(checkpoint=folder, out=tmp_path / "artifact"))
    assert [path.name for path in (tmp_path / "artifact").iterdir()] == [".build.lock"]
    (floats,) = converted(folder, tmp_path / "floats", "none")
    assert all(torch.equal(floats[ours(each)], expected) for each, expected in dense.items())


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "compression_config"])
def test_settings_of_older_tools(file: str, plain: Plain, tmp_path: Path) -> None:
    folder = plain(tmp_path / "checkpoint", WHOLE)
    form = {"quantize_config.json": "gptq-asym", "quant_config.json": "awq"}.get(file, "w4a16")
    pack_checkpoint(folder, FORMS[form])
    expected = read_packing(folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    if file == "compression_config":
        config[file] = {key: value for key, value in settings.items() if key != "quant_method"}
    else:
        del settings["quant_method"]
        if file == "quant_config.json":
            settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        (folder / file).write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    assert expected is not None and read_packing(folder) == expected
    read_config(folder)


GROUP = "config_groups", "group_0"


@pytest.mark.parametrize(
    ("form", "path", "value", "message"),
    [
        ("awq", ("quant_method",), "bitsandbytes", "quant_method of the quantisation is 'bitsandbytes', which is not"),
        ("awq", ("version",), "gemv", "version of the quantisation is 'gemv', expected 'gemm'; supported are"),
        ("awq", ("zero_point",), False, "zero_point"),
        ("awq", ("bits",), 8, "bits of the quantisation is 8, expected 4;"),
        ("awq", ("group_size",), "128", "group_size of the quantisation is '128'; expected a positive integer or -1"),
        ("gptq", ("bits",), 3, "bits of the quantisation is 3, expected 4 or 8;"),
        ("gptq", ("checkpoint_format",), "marlin", "checkpoint_format of the quantisation is 'marlin'"),
        ("gptq", ("is_marlin_format",), True, "is_marlin_format"),
        ("gptq", ("group_size",), 48, r"groups of 48; expected a multiple of 32: compile with --quant none"),
        ("w4a16", ("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
        ("w4a16", ("transform_config",), {"config_groups": {"u": {}}}, "transform_config"),
        ("gptq", ("adapter",), {"name": "lora"}, "adapter of the quantisation is {'name': 'lora'}, expected None;"),
        ("w4a16", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparsity_config's format"),
        ("w4a16", ("format",), "marlin-24", "format of the quantisation is 'marlin-24'"),
        ("w4a16", ("config_groups",), {}, "config_groups of the quantisation is {}; expected groups of layers"),
        ("w4a16", (*GROUP, "weights", "type"), "float", "weights' type"),
        ("w4a16", (*GROUP, "weights", "strategy"), "tensor", "weights' strategy"),
        ("w4a16", (*GROUP, "input_activations"), {"num_bits": 8}, "weights' num_bits, beside rounded activations, of the qu"),
        ("w8a8", (*GROUP, "input_activations", "dynamic"), False, "input_activations' dynamic of the quantisation is False"),
        ("w8a8", (*GROUP, "input_activations", "strategy"), "tensor", "input_activations' strategy"),
        ("w8a8", (*GROUP, "output_activations"), {"num_bits": 8}, "output_activations"),
        ("w8a8", ("config_groups", "group_1"), FORMS["w4a16"].settings["config_groups"]["group_0"], "in different ways"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(form: str, path: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    settings = json.loads(json.dumps(FORMS[form].settings))
    inside = settings
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(ConfigError, match=message):
        resolve(Options(checkpoint=tmp_path, out=tmp_path))


def test_what_was_asked_for(plain: Plain, tmp_path: Path) -> None:
    folder = plain(tmp_path / "checkpoint", WHOLE)
    given = Options(checkpoint=folder, out=tmp_path / "out")
    assert resolve(given) == (given, None)
    with pytest.raises(PlanError, match=r"w8a8\+float-head is for checkpoints that are quantised, and .* is not"):
        resolve(Options(checkpoint=folder, out=tmp_path, quant="w8a8+float-head"))
    pack_checkpoint(folder, FORMS["awq"])
    for quant, expected in (
        ("", "w4a16-g32-asym+float-head"),
        ("w4a16", "w4a16-g32-asym+float-head"),
        ("w4a16-g32", "w4a16-g32-asym+float-head"),
        ("none", "none"),
    ):
        found, packing = resolve(Options(checkpoint=folder, out=tmp_path, quant=quant))
        assert (found.quant, packing) == (expected, read_packing(folder))
    for quant in ("w8a16", "w8a8", "w8a8+vision"):
        with pytest.raises(
            PlanError, match=r"is quantised already and would be stored as w4a16-g32-asym\+float-head: leave --quant out"
        ):
            resolve(Options(checkpoint=folder, out=tmp_path, quant=quant))
    with pytest.raises(PlanError, match=r"adapter .* cannot be merged into .* quantised.* --quant none"):
        resolve(Options(checkpoint=folder, out=tmp_path, lora=tmp_path))
    with pytest.raises(PlanError, match="is quantised already, so nothing is left to calibrate; leave --calibrate out"):
        resolve(Options(checkpoint=folder, out=tmp_path, quant="w4a16", calibration=Calibration((), "")))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FIRST = "model.language_model.layers.0.mlp.up_proj"


def set_tensor(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{FIRST}.{name}": make(tensors[f"{FIRST}.{name}"])})


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", lambda t: t.pop(f"{FIRST}.scales"), "up_proj lacks scales; fetch the checkpoint again"),
        ("w4a16", lambda t: t.pop(f"{FIRST}.weight_shape"), "up_proj lacks weight_shape"),
        ("w4a16-asym", lambda t: t.pop(f"{FIRST}.weight_zero_point"), "up_proj lacks weight_zero_point"),
        ("gptq", set_tensor("scales", lambda t: t[:1].clone()), r"float16 \[1, 128\], expected .* \[3, 128\] for 4 bits"),
        ("awq", set_tensor("qzeros", lambda t: t.half()), r"qzeros is float16 \[3, 16\], expected int32 \[3, 16\]"),
        ("gptq", set_tensor("qzeros", lambda t: t + 1), r"has zero points, but the .* settings say that it is symmetric"),
        ("gptq", set_tensor("scales", lambda t: t / 0), "has scales that are not finite"),
        ("gptq", set_tensor("g_idx", lambda t: t + 1), "has columns of groups without a scale"),
        ("gptq", lambda t: t.update({f"{FIRST}.bias": torch.ones(128)}), "unknown tensors: .*up_proj.bias"),
        ("gptq", set_tensor("qweight", lambda t: torch.cat((t, t))), "expected"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(
    form: str, change: Callable[[dict[str, Tensor]], object], message: str, plain: Plain, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "checkpoint", WHOLE)
    pack_checkpoint(folder, FORMS[form])
    rewrite(folder, change)
    quant = resolve(Options(checkpoint=folder, out=tmp_path))[0].quant
    with pytest.raises(WeightsError, match=message):
        converted(folder, tmp_path / "out", quant)


def test_layers_of_two_forms_are_refused(plain: Plain, tmp_path: Path) -> None:
    folder = plain(tmp_path / "checkpoint", WHOLE)
    pack_checkpoint(folder, FORMS["gptq"], chosen=lambda name: "mlp" in name)
    source, config = opened(folder)
    plan = match(config, source.tensors)
    with pytest.raises(WeightsError, match=r"some layers .* \(.*attn.q_proj.weight, 4 in all\).* --quant none"):
        check_layers(plan, source, "w4a16-g32+float-head")
    empty = plain(tmp_path / "empty", WHOLE)
    shutil.copy(folder / "config.json", empty / "config.json")
    with pytest.raises(WeightsError, match=r"settings say that it is quantised \(gptq\), but it holds no such tensors"):
        opened(empty)


def test_what_else_reads_a_checkpoint(plain: Plain, tmp_path: Path) -> None:
    """compare's definitions, and adapters of --quant none, see the weights that packed ones stand for; a checkpoint of the same
    settings with random weights is not quantised."""
    folder = plain(tmp_path / "checkpoint", WHOLE)
    dense = pack_checkpoint(folder, FORMS["awq"])
    side = Checkpoint(folder)
    try:
        spec = side.weights[ours(f"{FIRST}.weight")]
        assert torch.equal(map_weight(side.out, spec), dense[f"{FIRST}.weight"])
    finally:
        side.close()
    main([str(folder), "--out", str(tmp_path / "random"), "--dtype", "float32"])
    assert read_packing(tmp_path / "random") is None, "random weights are in floating point"
    a, b = torch.randn(2, 96), torch.randn(128, 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = f"base_model.model.{FIRST}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    source, config = opened(folder)
    merged = open_adapter(adapter, config, source).read(f"{FIRST}.weight")
    torch.testing.assert_close(merged, dense[f"{FIRST}.weight"] + b @ a)


def test_biases_of_zeros_are_left_out(plain: Plain, tmp_path: Path) -> None:
    """AutoGPTQ wrote them for layers without one."""
    folder = plain(tmp_path / "checkpoint", WHOLE)
    pack_checkpoint(folder, FORMS["gptq"])
    rewrite(folder, lambda t: t.update({f"{FIRST}.bias": torch.zeros(128, dtype=torch.float16)}))
    (stored,) = converted(folder, tmp_path / "out", "w4a16-g32+float-head")
    assert "text.layers.0.mlp.up.bias" not in stored


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16", "w8a16-row-asym", "w8a8"])
def test_what_the_library_writes(name: str, plain: Plain, tmp_path: Path) -> None:
    """compressed-tensors' own compressor and decompressor, in bfloat16's place float32."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    form = FORMS[name]
    folder = plain(tmp_path / "checkpoint", WHOLE)
    group = form.settings[GROUP[0]][GROUP[1]]
    scheme = QuantizationScheme.model_validate(group)
    library = BaseCompressor.get_value_from_registry(form.version)
    dense: dict[str, Tensor] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for each in [each for each in tensors if "language_model.layers" in each and each.endswith("proj.weight")]:
            weight, stem = tensors.pop(each), each.removesuffix("weight")
            groups = weight.shape[1] // form.group if form.group else 1
            blocks = weight.unflatten(1, (groups, -1))
            low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
            steps, half = (1 << form.bits) - 1, 1 << form.bits - 1
            scale = (high - low) / steps if not form.symmetric else blocks.abs().amax(-1) * 2 / steps
            zero = torch.zeros_like(scale) if form.symmetric else (-low / scale).round() - half
            state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
            state = library.compress(state, scheme)
            dense[each] = library.decompress(state, scheme)["weight"]
            tensors |= {stem + part: value for part, value in state.items()}

    rewrite(folder, pack)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": form.settings}
    (folder / "config.json").write_text(json.dumps(config))
    quant = resolve(Options(checkpoint=folder, out=tmp_path))[0].quant
    (stored,) = converted(folder, tmp_path / "out", quant)
    assert len(dense) == 7
    for each, expected in dense.items():
        torch.testing.assert_close(read(stored, ours(each), quant, expected.shape[1]), expected, rtol=1e-6, atol=0)
