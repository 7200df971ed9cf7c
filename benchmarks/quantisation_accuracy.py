"""Cost of a quantisation in accuracy: right answers and logits of the trained tiny models, on drawings unseen in training.

    python -m benchmarks.quantisation_accuracy [--models tiny_llava15,...] [--quants w8a16,...] [--drawings 40] [--backend onnx]
        [--calibrate 32 [--kv-cache int8]] [--weights-alone]

With --calibrate N every quantisation that allows it is also measured after a calibration with N prompts about other drawings.
With --kv-cache int8 each quantisation is measured with an 8-bit cache only (`none` may be among them).
With --weights-alone rounded weights are measured too, computed in floats, by how many of them share a scale: in 8 bits a block,
and a whole column, as artifacts for Ascend store them; in 4 bits groups of 32, 64 and 128, with lm_head in 8 bits and columns.
With --outliers F a few channels after every norm become F times as large, and the weights after them F times smaller. In floats
this is the same model; its activations resemble those of large models.

Answers are greedy. Logits are compared teacher-forced, before each token of the float model's own answers: the share of equal
top-1 tokens, and the mean Kullback-Leibler divergence in nats. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from staticvl.compiler.build import build
from staticvl.compiler.calibration import METHODS, Calibration
from staticvl.compiler.plan import Buckets, Options
from staticvl.model_defs.config import KV_CACHES, QUANTS, quant_block, read_config
from staticvl.tools.calibration_file import read_calibration
from staticvl.tools.comparing.metrics import compare_logits
from staticvl.tools.comparing.samples import user_sample
from staticvl.tools.comparing.static_side import StaticSide, open_artifact_side
from staticvl.tools.development.train_tiny import Case, cases
from staticvl.tools.development.training.data import HELD_OUT_SEED
from staticvl.tools.drawings import iou, parse_box
from staticvl.weights.quantize import dequantize_w4, dequantize_w8, quantize_w4, quantize_w8
from staticvl.weights.source import open_source
from staticvl.weights.storage import quant_of
from staticvl.weights.weight_map import match

ASSETS = Path(__file__).parent.parent / "tools" / "assets"
MODELS = ("tiny_llava15", "tiny_llava16", "tiny_mllama")
CALIBRATION_SEED = HELD_OUT_SEED + 10_000
OUTLIERS = (5, 38, 71, 104)  # channels
AFTER_NORM = {  # a norm, and the weights that take what it puts out
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "cross_attn.q_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}
COLUMN, BLOCK = 0, -1  # in place of a number of weights that share a scale: all of a row, and as ONNX artifacts have it
WEIGHTS_ALONE = {  # label -> bits of the decoder's layers, and how many weights share a scale
    "weights, block scales": (8, BLOCK),
    "weights, column scales": (8, COLUMN),
    "weights, 4 bits by 32": (4, 32),
    "weights, 4 bits by 64": (4, 64),
    "weights, 4 bits by 128": (4, 128),
}
EXTRA = "two pictures"  # a kind that not every model has learnt well


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers of one model to all cases."""

    tokens: list[np.ndarray]
    right: list[bool]


def compiled(
    checkpoint: Path,
    quant: str,
    out: Path,
    backend: str = "onnx",
    calibration: Calibration | None = None,
    kv_cache: str = "float",
) -> StaticSide:
    """A trained model, compiled and opened."""
    images = (2,) if checkpoint.name == "tiny_mllama" else None
    buckets = Buckets(prefill=(64,), decode=(4,), context=1024, slots=4, images=images)
    options = Options(checkpoint=checkpoint, out=out, buckets=buckets, quant=quant, backend=backend)
    build(replace(options, calibration=calibration, kv_cache=kv_cache))
    return open_artifact_side(out, device="auto", threads=None, name=out.name)


def with_outliers(checkpoint: Path, out: Path, factor: float) -> Path:
    """The same function in floats: `OUTLIERS` of every decoder norm are larger, and the columns that take them smaller."""
    shutil.copytree(checkpoint, out)
    file = out / "model.safetensors"
    tensors = {name: value.float() for name, value in load_file(file).items()}
    for name, value in tensors.items():
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if "language_model" not in name or norm not in AFTER_NORM:
            continue
        value[list(OUTLIERS)] *= factor
        for linear in AFTER_NORM[norm]:
            if (weight := tensors.get(f"{layer}.{linear}.weight")) is not None:
                weight[:, list(OUTLIERS)] /= factor
    save_file(tensors, file)
    return out


def with_rounded(checkpoint: Path, out: Path, bits: int, group: int) -> Path:
    """The model with the decoder's layers and lm_head rounded; lm_head in 8 bits, beside 4 bits by columns."""
    recipes = match(read_config(checkpoint), open_source(checkpoint).tensors).recipes
    quantised = {name: recipe.tensors[0].name for name, recipe in recipes.items() if quant_of(name, "w8a16") != "none"}
    shutil.copytree(checkpoint, out)
    file = out / "model.safetensors"
    tensors = {name: value.float() for name, value in load_file(file).items()}
    for source in set(quantised.values()):
        head = source == quantised.get("text.lm_head.weight")
        tensors[source] = rounded(tensors[source], *((8, COLUMN) if head and bits == 4 else (bits, group)))
    save_file(tensors, file)
    return out


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """weight [N, K], with `group` of a row sharing a scale in float32."""
    width = weight.shape[1]
    block = {COLUMN: width, BLOCK: quant_block(width)}.get(group, group)
    quantize, dequantize = (quantize_w8, dequantize_w8) if bits == 8 else (quantize_w4, dequantize_w4)
    return dequantize(*quantize(weight, block), width).contiguous()  # without the padding of a last block


def calibration(prompts: int, folder: Path) -> Calibration:
    """Prompts with answers about drawings that nothing else here shows, through the file that a user would write."""
    asked_for = [case for case in cases(prompts, CALIBRATION_SEED) if not case.turns and case.kind != EXTRA]
    sample = asked_for[:: max(1, len(asked_for) // prompts)][:prompts]
    folder.mkdir()
    lines = []
    for i, case in enumerate(sample):
        names = [f"{i}-{j}.png" for j in range(len(case.images))]
        for name, image in zip(names, case.images, strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"prompt": case.question, "images": names, "answer": case.answer}))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines))
    return read_calibration(file)


def answered(side: StaticSide, questions: list[Case]) -> Answers:
    """The model's own greedy answers."""
    images = [list(case.images) for case in questions]
    outs = side.model.generate([case.question for case in questions], images, max_new_tokens=80, temperature=0.0)
    right = [is_right(case, out.text) for case, out in zip(questions, outs, strict=True)]
    return Answers([np.array(out.token_ids) for out in outs], right)


def is_right(case: Case, text: str) -> bool:
    """Word for word; a box when it overlaps the true one by three quarters."""
    if case.kind != "box":
        return text == case.answer
    box, true = parse_box(text), parse_box(case.answer)
    return box is not None and true is not None and iou(box, true) >= 0.75


def forced(side: StaticSide, questions: list[Case], answers: Answers) -> list[np.ndarray]:
    """Logits [n, V] before each token of the answers."""
    prompts = [side.prepare(user_sample(case.kind, case.question, case.images)) for case in questions]
    return [answer.logits for answer in side.run_forced(prompts, answers.tokens)]


def measure(
    checkpoint: Path,
    quants: list[str],
    drawings: int,
    backend: str,
    prompts: int,
    folder: Path,
    kv_cache: str = "float",
    weights_alone: bool = False,
) -> dict[str, dict[str, float]]:
    """Figures of one model by quantisation."""
    used = calibration(prompts, folder / "calibration") if prompts else None
    kinds = [(quant, quant, None) for quant in quants]
    if kv_cache == "int8":
        kinds = [(f"{quant}, int8 cache", quant, used) for quant in quants]
    elif used:
        kinds += [(f"{quant}, calibrated", quant, used) for quant in quants if quant in METHODS]
    kinds += [(label, "none", None) for label in WEIGHTS_ALONE] if weights_alone else []
    questions = [case for case in cases(drawings) if not case.turns and case.kind != EXTRA]
    reference = compiled(checkpoint, "none", folder / "none", backend)
    answers = answered(reference, questions)
    logits = forced(reference, questions, answers)
    results = {"none": {"right": float(np.mean(answers.right)), "cases": float(len(questions))}}
    for label, quant, by in kinds:
        source = checkpoint
        if label in WEIGHTS_ALONE:
            source = with_rounded(checkpoint, folder / f"{label}, checkpoint", *WEIGHTS_ALONE[label])
        side = compiled(source, quant, folder / label, backend, by, kv_cache)
        own = answered(side, questions)
        figures = [compare_logits(*each) for each in zip(logits, forced(side, questions, answers), answers.tokens, strict=True)]
        rows = np.array([len(each) for each in answers.tokens])
        roundings = [g.certificate.rounding for g in side.artifact.manifest.graphs if g.certificate and g.certificate.rounding]
        results[label] = {
            "right": float(np.mean(own.right)),
            "same answers": float(np.mean([np.array_equal(a, b) for a, b in zip(own.tokens, answers.tokens, strict=True)])),
            "agreement": float(np.average([each.agreement for each in figures], weights=rows)),
            "kl": float(np.average([each.kl_mean for each in figures], weights=rows)),
            "rounding": max(roundings, default=0.0),
            "tokens": float(rows.sum()),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="embedded models, separated by commas")
    parser.add_argument("--quants", default=",".join(QUANTS[1:]), help="formats, separated by commas")
    parser.add_argument("--drawings", type=int, default=40, help="drawings; one question of each kind about each; default: 40")
    parser.add_argument(
        "--backend", default="onnx", choices=("onnx", "ascend"), help="backend that runs the artifacts; default: onnx"
    )
    parser.add_argument(
        "--outliers", type=float, default=1.0, metavar="F", help="factor of the enlarged channels; 1: none; default: 1.0"
    )
    parser.add_argument(
        "--calibrate", type=int, default=0, metavar="PROMPTS", help="prompts of a calibration; 0: none; default: 0"
    )
    parser.add_argument("--kv-cache", default="float", choices=KV_CACHES, help="dtype of the cache; default: float")
    parser.add_argument(
        "--weights-alone", action="store_true", help="measure rounded weights alone too, by kinds of scales; default: no"
    )
    args = parser.parse_args()
    if args.kv_cache == "int8" and not args.calibrate:
        parser.error("a cache in 8 bits is calibrated; give --calibrate PROMPTS")
    table = {}
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory(prefix="staticvl-") as folder:
            checkpoint = ASSETS / model
            if args.outliers > 1:
                checkpoint = with_outliers(checkpoint, Path(folder) / model, args.outliers)
            table[model] = measure(
                checkpoint,
                args.quants.split(","),
                args.drawings,
                args.backend,
                args.calibrate,
                Path(folder),
                args.kv_cache,
                args.weights_alone,
            )
        for quant, f in table[model].items():
            line = f"{model:14} {quant:23} right {100 * f['right']:6.2f} %"
            if quant != "none":
                line += f"  same answers {100 * f['same answers']:6.2f} %  agreement {100 * f['agreement']:7.3f} %"
                line += f"  KL {f['kl']:.2e}  rounding {f['rounding']:.3f}"
            print(line, flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
