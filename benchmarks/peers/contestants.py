"""Who takes part: one line each. A further way to quantise, or a further peer, is a further line."""

from __future__ import annotations

from dataclasses import dataclass

OURS, STATICVL, OWN = "ours", "staticvl", "own"


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the model."""

    name: str
    runner: str  # module of benchmarks.peers.runners
    setting: str  # what the runner is told
    gigabytes: float  # of memory that the full-size model takes, about: how many contestants are alive together depends on it
    # Furthest that its logits may be from float32 ones, as a share of their length; random weights amplify rounding.
    tolerance: float
    venv: str = "peers"  # whose Python runs it: "ours" or that of peers/requirements.txt

    @property
    def is_ours(self) -> bool:
        return self.runner == STATICVL


CONTESTANTS = (
    Contestant("staticvl float32", STATICVL, "none", 6.0, 1e-3, OURS),
    Contestant("staticvl w8a16", STATICVL, "w8a16", 3.4, 0.3, OURS),
    Contestant("staticvl w8a8", STATICVL, "w8a8", 3.4, 0.4, OURS),
    Contestant("staticvl w4a16", STATICVL, "w4a16", 2.8, 1.0, OURS),
    Contestant("transformers eager", "hf", "eager", 3.6, 0.2, OURS),
    Contestant("transformers compiled", "hf", "compiled", 4.6, 0.2, OURS),
    Contestant("onnxruntime-genai int4", "genai", "int4", 1.6, 1.0),
    Contestant("llama.cpp F16", "llama_cpp", "F16", 2.6, 0.1),
    Contestant("llama.cpp Q8_0", "llama_cpp", "Q8_0", 1.6, 0.3),
    Contestant("llama.cpp Q4_0", "llama_cpp", "Q4_0", 1.1, 1.0),
    Contestant("openvino int8", "openvino", "int8", 2.6, 0.3),
    Contestant("openvino int4", "openvino", "int4", 2.0, 1.0),
)
ANCHOR = CONTESTANTS[1].name  # takes part in every group
