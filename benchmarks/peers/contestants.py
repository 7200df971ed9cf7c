"""The contestants: one line each. A further quantisation, or a further peer, is a further line."""

from __future__ import annotations

from dataclasses import dataclass

OURS, PEERS = "ours", "peers"


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the model."""

    name: str
    runner: str  # module of benchmarks.peers.runners
    setting: str  # argument of the runner
    gigabytes: float  # of memory that the full-size model takes, about: how many contestants are alive together depends on it
    # Furthest that its logits may be from float32 ones, as a share of their length; random weights amplify rounding.
    tolerance: float
    venv: str = PEERS  # whose Python runs it: OURS, or that of requirements.txt

    @property
    def is_ours(self) -> bool:
        return self.runner == OURS


CONTESTANTS = (
    Contestant("staticvl float32", "ours", "none", 6.0, 1e-3, OURS),
    Contestant("staticvl w8a16", "ours", "w8a16", 3.4, 0.3, OURS),
    Contestant("staticvl w8a8+vision", "ours", "w8a8+vision", 2.6, 0.4, OURS),
    Contestant("staticvl w4a16", "ours", "w4a16", 2.8, 1.0, OURS),
    Contestant("transformers eager", "hf", "eager", 3.6, 0.2, OURS),
    # What people run where the processor has no bfloat16: without, products in it are five times as slow as in float32.
    Contestant("transformers float32", "hf", "float32", 5.4, 1e-3, OURS),
    Contestant("transformers compiled", "hf", "compiled", 4.6, 0.2, OURS),
    Contestant("onnxruntime-genai int4", "ort_genai", "int4", 1.6, 1.0),
    Contestant("llama.cpp F16", "llamacpp", "F16", 2.6, 0.1),
    Contestant("llama.cpp Q8_0", "llamacpp", "Q8_0", 1.6, 0.3),
    Contestant("llama.cpp Q4_0", "llamacpp", "Q4_0", 1.1, 1.0),
    Contestant("openvino int8", "ov", "int8", 2.6, 0.3),
    Contestant("openvino int4", "ov", "int4", 2.0, 1.0),
)
ANCHOR = CONTESTANTS[1].name  # takes part in every group
