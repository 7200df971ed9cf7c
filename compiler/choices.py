"""Values that options of a build may have, and defaults.

Needs the standard library alone, because the help of the command line is made from it.
"""

from __future__ import annotations

from ..model_defs.config import QUANTS

BACKENDS = ("onnx", "ascend")
READY_QUANTS = {"onnx": QUANTS, "ascend": QUANTS}
DTYPES = {"onnx": ("float32", "float16", "bfloat16", "auto"), "ascend": ("float16", "bfloat16")}  # the first is the default
DEFAULT_CONTEXT = 2048
DEFAULT_SLOTS = 4
DEFAULT_PREFILL = (16, 64, 256)
DEFAULT_IMAGES = (1, 4)
# The top-k tokens that text graphs output: a host that scans logits in the memory of a device has to copy them.
DEFAULT_CANDIDATES = {"onnx": 0, "ascend": 64}
MOST_CANDIDATES = 1024
MAX_BUCKET = 1 << 16
INT8_CACHE_LACKS = "Ascend310P"  # whose fused attention takes no int8 keys (torch_npu's documentation of the operator)
EAGER_ONLY = "Ascend310P"  # whose compiler has no fused attention
FIA_DEFINITION = "attention/fused_infer_attention_score/op_host/fused_infer_attention_score_def.cpp"
KV_FORMS = ("pages", "slots")  # how the cache of text is stored
TEXT_BEFORE_IMAGE = ("transformers", "meta")  # the first is the default


class PlanError(ValueError):
    """Options that cannot be compiled; the message says what to change."""
