"""Matrix products with weights in floats, 8 and 4 bits.

C in features, N out features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operators import aten, npu

TYPE_NUMBERS = {torch.float16: 5, torch.bfloat16: 15}  # torch's own numbers of dtypes (c10::ScalarType)
# So many out features are the most that CANN's WeightQuantBatchMatmulV2 takes.
MOST_W8_FEATURES = 65535


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """MatMul of flattened rows that takes the weight [N, C] as transposed: it is read as it is stored, never copied.

    x is brought to the weight's type here: normalised pixels come in float32.
    """
    rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
    return npu.npu_linear.default(rows, weight, bias).reshape(*x.shape[:-1], weight.shape[0])


def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """WeightQuantBatchmatmul over groups of a block, or with one scale for each column where qweight is [N, C]. `qweight`
    comes as int8 around zero, `zeros` as offsets (to_signed and to_offsets in runtime/backends/ascend/weights.py)."""
    return _grouped(x, qweight, scales, bias, zeros, qweight.shape[-1])


def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, zeros: Tensor | None = None) -> Tensor:
    """The same, eight numbers of 4 bits in an int32; a transposed one is packed along the input features."""
    return _grouped(x, qweight, scales, bias, zeros, 8 * qweight.shape[2])


def linear_packed(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    """The product in 4 bits over qweight [C, N / 8] int32, packed along the out features, and scales and offsets [blocks, N]:
    the operator's weight as it lies, not transposed (weights/ascend_forms.py)."""
    blocks, n = scales.shape
    y = npu.npu_weight_quant_batchmatmul.default(
        x.reshape(-1, x.shape[-1]),
        qweight,
        scales,
        antiquant_offset=offsets,
        bias=None if bias is None else bias.float() if x.dtype == torch.bfloat16 else bias,
        antiquant_group_size=x.shape[-1] // blocks if blocks > 1 else 0,
    )
    return y.reshape(*x.shape[:-1], n)


def _grouped(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, offsets: Tensor | None, block: int) -> Tensor:
    """qweight [N, blocks, ..] or [N, C] as it lies, scales and offsets [N, blocks].

    Transposing weight, scales and offsets [N, ..] is left to the operator, which reads both either way, so no weight is copied;
    only a head of more than 65535 features is cut into pieces, which may cost a copy. A last block that is not full is
    zeros in the weight, so x is filled up with zeros.
    """
    n, blocks = scales.shape
    rows = x.reshape(-1, x.shape[-1])
    rows = aten.constant_pad_nd.default(rows, [0, blocks * block - x.shape[-1]]) if blocks * block > x.shape[-1] else rows
    weight = qweight.flatten(1)
    bias = None if bias is None else bias.float() if x.dtype == torch.bfloat16 else bias
    size = math.ceil(n / math.ceil(n / MOST_W8_FEATURES))
    pieces = [
        npu.npu_weight_quant_batchmatmul.default(
            rows,
            weight[start : start + size].t(),
            scales[start : start + size].t(),
            antiquant_offset=None if offsets is None else offsets[start : start + size].t(),
            bias=None if bias is None else bias[start : start + size],
            antiquant_group_size=block if blocks > 1 else 0,  # one block a row is what the operator calls per channel
        )
        for start in range(0, n, size)
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)).reshape(*x.shape[:-1], n)


def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    """DynamicQuant, once for all products of one input, and QuantBatchMatmul. Activations are rounded in any case; the
    simulator's wide mode does not (ge_ops/quant.py)."""
    rows, row_scales = npu.npu_dynamic_quant.default(x.reshape(-1, x.shape[-1]))
    number = TYPE_NUMBERS[x.dtype]
    y = npu.npu_quant_matmul.default(rows, qweight, scales, pertoken_scale=row_scales, bias=bias, output_dtype=number)
    return y.reshape(*x.shape[:-1], qweight.shape[1])
