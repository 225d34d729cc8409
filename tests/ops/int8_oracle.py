"""The int8 ops in numpy's int64 and float64; shares nothing with the package.

A weight is [N, K] int8 with a scale per row; an input row has a scale, a zero point, and bytes.
"""

from __future__ import annotations

import math

import numpy as np

ACTS = {
    "gelu": lambda z: z * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def quantize_weight(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [N, K] and scales [N] of a float weight [N, K]."""
    scale = (np.abs(w).max(1) / np.float32(127)).astype(np.float32)
    inverse = np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(np.float32)
    return np.rint(w * inverse[:, None]).astype(np.int64), scale


def quantize_row(x: np.ndarray, fixed: tuple[float, float] | None = None):
    """Bytes, scale and zero point of a float32 row."""
    low, high = fixed or (min(x.min(), 0), max(x.max(), 0))
    scale = (np.float32(high) - np.float32(low)) / np.float32(255)
    if scale == 0:
        return np.zeros(len(x), np.int64), np.float32(0), 0
    inverse = np.float32(1) / scale
    zero = int(np.rint(-np.float32(low) * inverse))
    q = np.rint((x * inverse).astype(np.float32)).astype(np.int64) + zero
    return np.clip(q, 0, 255), scale, zero


def linear(x, w, bias=None, fixed=None) -> np.ndarray:
    """W x + b, [T, N] float64, for x [T, K] float32 and (int8, scales) of W."""
    values, scale = w
    y = np.empty((len(x), len(values)))
    for t, row in enumerate(x):
        q, s, zero = quantize_row(row, fixed)
        y[t] = ((q - zero) @ values.T) * float(s) * scale.astype(float)
    return y if bias is None else y + bias


def mlp(x, up, down, up_bias, down_bias, act, gated, fixed=(None, None)) -> np.ndarray:
    """The MLP of one expert."""
    z = linear(x, up, up_bias, fixed[0])
    if gated and act == "clamped_swiglu":
        z1, z2 = np.split(z, 2, axis=1)
        z1, z2 = np.minimum(z1, 7), np.clip(z2, -7, 7)
        h = z1 / (1 + np.exp(-1.702 * z1)) * (z2 + 1)
    elif act == "clamped_swiglu":
        z = np.minimum(z, 7)
        h = z / (1 + np.exp(-1.702 * z))
    elif gated:
        z1, z2 = np.split(z, 2, axis=1)
        h = ACTS[act](z1) * z2
    else:
        h = ACTS[act](z)
    return linear(h.astype(np.float32), down, down_bias, fixed[1])
