"""Error of rounded weights at the widths of a 7B model, by how many weights share a scale.

    python -m benchmarks.studies.weight_rounding [--rows 512] [--tokens 64] [--seed 0]

Weights [rows, K] are random: normal, with heavy tails (Student's t, 5 degrees of freedom), or with outliers in K. "large
columns" are 4 input features whose weights are 8 times as large. "large inputs" are 4 features that are 32 times as large as
the others, with weights 32 times smaller: what models with outlier channels have after their norms. Figures are relative to
the length of what is exact: of the weights, and of their products with random inputs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from staticvl.weights.quantize import dequantize_w4, dequantize_w8, quantize_w4, quantize_w8

WIDTHS = (4096, 11008)  # hidden size and MLP
FORMS = {  # bits, and weights of a row that share a scale; 0: all of them
    "8 bits, 128": (8, 128),
    "8 bits, column": (8, 0),
    "4 bits, 32": (4, 32),
    "4 bits, 64": (4, 64),
    "4 bits, 128": (4, 128),
}
OUTLIERS, LARGE_COLUMN, LARGE_INPUT = 4, 8.0, 32.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Weights [N, K] and the inputs [T, K] that they multiply."""

    weights: Tensor
    inputs: Tensor


def normal(rows: int, columns: int, tokens: int) -> Sample:
    return Sample(torch.randn(rows, columns), torch.randn(tokens, columns))


def heavy_tails(rows: int, columns: int, tokens: int) -> Sample:
    weights = torch.distributions.StudentT(5.0).sample((rows, columns))
    return Sample(weights, torch.randn(tokens, columns))


def large_columns(rows: int, columns: int, tokens: int) -> Sample:
    sample = normal(rows, columns, tokens)
    sample.weights[:, places(columns)] *= LARGE_COLUMN
    return sample


def large_inputs(rows: int, columns: int, tokens: int) -> Sample:
    sample = normal(rows, columns, tokens)
    sample.weights[:, places(columns)] /= LARGE_INPUT
    sample.inputs[:, places(columns)] *= LARGE_INPUT
    return sample


def places(columns: int) -> Tensor:
    """Of the outliers, in blocks of their own."""
    return torch.arange(OUTLIERS) * (columns // OUTLIERS) + 37


KINDS: dict[str, Callable[[int, int, int], Sample]] = {
    "normal": normal,
    "heavy tails": heavy_tails,
    "large columns": large_columns,
    "large inputs": large_inputs,
}


def rounded(weights: Tensor, bits: int, block: int) -> Tensor:
    """The weights that are stored, with scales in float16."""
    columns = weights.shape[1]
    quantize, dequantize = (quantize_w8, dequantize_w8) if bits == 8 else (quantize_w4, dequantize_w4)
    q, scales = quantize(weights, block or columns)
    return dequantize(q, scales.half().float(), columns)


def errors(sample: Sample, bits: int, block: int) -> tuple[float, float]:
    """Of the weights, and of their products."""
    difference = rounded(sample.weights, bits, block) - sample.weights
    products = sample.inputs @ sample.weights.T
    return float(difference.norm() / sample.weights.norm()), float((sample.inputs @ difference.T).norm() / products.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="output features; default: 512")
    parser.add_argument("--tokens", type=int, default=64, help="inputs that the weights multiply; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs; default: 0")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    table = {}
    for kind, draw in KINDS.items():
        for columns in WIDTHS:
            sample = draw(args.rows, columns, args.tokens)
            found = {form: errors(sample, *how) for form, how in FORMS.items()}
            table[f"{kind}, {columns}"] = found
            cells = "  ".join(f"{form}: {100 * a:.2f} % {100 * b:.2f} %" for form, (a, b) in found.items())
            print(f"{kind:13} K {columns:5}  {cells}", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
