"""Rotary embedding tables, and what long texts do to them. D head dim."""

from __future__ import annotations

import math

import numpy as np

from .artifact import Llama3Scaling, RopeParameters


def rope_tables(rope: RopeParameters, head_dim: int, rows: int, ntk: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, float32 [rows, D], both halves equal.

    Frequency i is theta^(-2i/D) (Su et al. 2021), in float32 like the reference implementations. The power alone is taken in
    float64 and rounded: numpy's float32 power is off in the last bit, which at position 4096 is an angle off by 1e-4.
    `ntk` is `ntk_factor` of the prompt: the base is multiplied by its power D / (D - 2).
    """
    theta = rope.theta * ntk ** (head_dim / (head_dim - 2))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    if rope.llama3:
        inverse = _llama3(inverse, rope.llama3)
    angles = np.arange(rows, dtype=np.float32)[:, None] * inverse
    angles = np.concatenate((angles, angles), axis=1)
    return np.cos(angles), np.sin(angles)


def _llama3(inverse: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (transformers' rope utilities)."""
    # Through the reciprocal, as torch divides a number by a tensor: another last bit here is seen thousands of tokens later.
    wavelengths = np.float32(1) / inverse * np.float32(2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = inverse / np.float32(scaling.factor)
    share = (np.float32(scaling.original_positions) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - share) * stretched + share * inverse
    long, short = wavelengths > scaling.original_positions / low, wavelengths < scaling.original_positions / high
    return np.where(long, stretched, np.where(short, inverse, blended)).astype(np.float32)


def ntk_factor(rope: RopeParameters, length: int) -> float:
    """Dynamic NTK's factor for a prompt of `length` tokens (Qwen): 1 up to the trained length n, then 3, 7, ...

    max(2^ceil(log2(length / n) + 1) - 1, 1); it stays what the prompt made it while the answer grows.
    """
    if rope.ntk_positions is None or length < 1:
        return 1.0
    return max(2.0 ** math.ceil(math.log2(length / rope.ntk_positions) + 1) - 1, 1.0)


def query_scales(rope: RopeParameters, rows: int) -> np.ndarray:
    """Factor of the query at each position, float32 [rows] (logn attention): log_n(position + 1) after position n, else 1."""
    positions = np.arange(1, rows + 1, dtype=np.float64)
    if rope.logn_positions is None:
        return np.ones(rows, np.float32)
    scales = np.log(positions) / math.log(rope.logn_positions)
    return np.where(positions > rope.logn_positions, scales, 1.0).astype(np.float32)
