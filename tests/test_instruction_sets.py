"""Numeric tests once more as on other processors: under the switches of torch's libraries, in processes of their own.

A limit that holds for the order in which one processor adds, or a kernel that is exact on it alone, fails here.
onnxruntime has no such switch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from staticvl.runtime.backends.cores import processor_features

REPO = Path(__file__).parent.parent

# oneDNN's AVX2 and AVX512_CORE have no VNNI; COMPATIBLE is the order of sums that MKL has on every processor.
SETTINGS = {
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
}
FEW = ("tests/test_quantised_products.py", "-k", "multiplies_whole or own_scale or 4_bits or around_zero")
NUMERIC = [
    f"tests/test_{name}.py"
    for name in (
        "quantised_products quantize stored_floats int8_cache gptq smoothing packing ge_ops ge_by_numpy ge_attention "
        "lower_ascend rope top_tokens candidates tp_definitions calibrate segments convert_families parity_llava "
        "parity_qwen_vl parity_mllama parity_llava_next ascend"
    ).split()
]


def run(setting: str, threads: int, *arguments: str) -> None:
    environment = {**os.environ, **SETTINGS[setting], "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_few_without_vnni() -> None:
    run("avx2", 2, *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_all_that_compute(setting: str, threads: int) -> None:
    if setting == "avx512" and "avx512f" not in processor_features():
        pytest.skip("this processor has no AVX-512: torch would end with an illegal instruction")
    run(setting, threads, *NUMERIC)
