"""Rotary tables and query scales, against transformers' own functions and values worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from staticvl.runtime.artifact import Llama3Scaling, RopeParameters
from staticvl.runtime.rope import ntk_factor, query_scales, rope_tables

POSITIONS = 4096
LLAMA32 = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_positions=8192)
QWEN = RopeParameters(theta=1e4, ntk_positions=2048, logn_positions=2048)


def llama_config(head_dim: int, **rope: object) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=POSITIONS + 1
    )
    config.rope_parameters = rope
    return config


def angles(rope: RopeParameters, head_dim: int, ntk: float = 1.0) -> np.ndarray:
    """Frequencies [D / 2]: the angles at position 1, all below half a turn."""
    cos, sin = rope_tables(rope, head_dim, 2, ntk)
    return np.arctan2(sin[1], cos[1])[: head_dim // 2]


# --- Plain -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 80, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rope_tables_equal_transformers(head_dim: int, theta: float) -> None:
    config = llama_config(head_dim, rope_type="default", rope_theta=theta)
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS + 1)[None])
    for ours, theirs in zip(rope_tables(RopeParameters(theta=theta), head_dim, POSITIONS + 1), wanted, strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-6)


def test_rope_tables_by_hand() -> None:
    """Frequencies 1 and theta^-1/2, angles position times frequency, both halves equal."""
    cos, sin = rope_tables(RopeParameters(theta=100.0), 4, 3)
    wanted = np.array([[0, 0], [1, 0.1], [2, 0.2]])
    np.testing.assert_allclose(cos, np.cos(np.hstack((wanted, wanted))), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(np.hstack((wanted, wanted))), atol=1e-7)


# --- Llama-3.1's scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("factor", "low", "high", "original"), [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 2, 8, 64)])
def test_llama3_scaling_equals_transformers(head_dim: int, factor: float, low: float, high: float, original: int) -> None:
    scaling = Llama3Scaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original)
    config = llama_config(
        head_dim,
        rope_type="llama3",
        rope_theta=5e5,
        factor=float(factor),
        low_freq_factor=float(low),
        high_freq_factor=float(high),
        original_max_position_embeddings=original,
    )
    inverse, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    assert attention_factor == 1.0
    rope = RopeParameters(theta=5e5, llama3=scaling)
    np.testing.assert_allclose(angles(rope, head_dim), inverse.numpy(), rtol=1e-6)
    assert np.abs(angles(rope, head_dim) / angles(RopeParameters(theta=5e5), head_dim) - 1).max() > 0.5  # it does something
    wanted = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS + 1)[None])
    for ours, theirs in zip(rope_tables(rope, head_dim, POSITIONS + 1), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "frequency"), [(0, 1.0), (20, 0.01656044), (32, 5.248462e-4), (40, 3.428102e-5), (63, 3.068926e-7)]
)
def test_frequencies_of_llama32_vision(index: int, frequency: float) -> None:
    assert angles(RopeParameters(theta=5e5, llama3=LLAMA32), 128)[index] == pytest.approx(frequency, rel=1e-6)
    assert angles(RopeParameters(theta=5e5), 128)[32] == pytest.approx(1.414214e-3, rel=1e-6)


# --- Qwen's long texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "factor"),
    [(1, 1), (1024, 1), (1025, 1), (2047, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15), (32768, 31)],
)
def test_factor_of_a_prompt(length: int, factor: float) -> None:
    assert ntk_factor(QWEN, length) == factor
    assert ntk_factor(RopeParameters(theta=1e4), length) == 1
    smallest = next(k for k in range(9) if length <= 2048 * 2**k)  # the rule in integers
    assert factor == 2 ** (smallest + 1) - 1


@pytest.mark.parametrize(("factor", "base"), [(1, 1e4), (3, 30527.7367), (7, 72195.8601), (15, 156588.3235)])
def test_base_of_a_factor(factor: float, base: float) -> None:
    found = angles(QWEN, 128, factor)
    np.testing.assert_allclose(found, angles(RopeParameters(theta=base), 128), rtol=1e-6)
    inverse = 1.0 / (base ** (torch.arange(0, 128, 2).float() / 128))
    np.testing.assert_allclose(found, inverse.numpy(), rtol=1e-6)


def test_a_factor_scales_as_dynamic_ntk_does_in_transformers() -> None:
    """There the factor of a length L is s * L / n - (s - 1): 3 at L = 2n with s = 2, whatever Qwen makes of L."""
    config = llama_config(64, rope_type="dynamic", rope_theta=1e4, factor=2.0)
    config.max_position_embeddings = 2048
    config.rope_parameters["original_max_position_embeddings"] = 2048
    inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, device=torch.device("cpu"), seq_len=4096)
    np.testing.assert_allclose(angles(QWEN, 64, 3.0), inverse.numpy(), rtol=1e-6)
    assert np.abs(angles(QWEN, 64, 1.0) - inverse.numpy()).max() > 1e-2


def test_query_scales() -> None:
    scales = query_scales(QWEN, 8192)
    assert scales.dtype == np.float32
    for position, wanted in ((0, 1.0), (2047, 1.0), (2048, 1.000064), (3000, 1.050112), (4095, 1.090909), (8191, 1.181818)):
        assert scales[position] == pytest.approx(wanted, abs=1e-6)
    table = [math.log(i, 2048) if i > 2048 else 1.0 for i in range(1, 8193)]
    np.testing.assert_allclose(scales, np.array(table, np.float32), rtol=1e-7)
    assert (query_scales(RopeParameters(theta=1e4), 8192) == 1).all()
