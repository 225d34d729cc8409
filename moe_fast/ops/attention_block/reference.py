"""attention_block in steps, of PyTorch's linear and the other ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.add_norm import add_norm
from moe_fast.ops.varlen_attention import varlen_attention


def in_steps(backend: str, x: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute each step for the whole batch, the attention and the norm by ``backend``."""
    weights, biases, (norm_weight, norm_bias) = arguments[:4], arguments[4:8], arguments[8:10]
    cu_seqlens, cos, sin, heads, scale, window, eps = arguments[10:]
    q, k, v = (
        F.linear(x, weight, bias).unflatten(1, (heads, -1))
        for weight, bias in zip(weights[:3], biases[:3], strict=True)
    )
    if cos is not None:
        q, k = (rotate(rows, cos, sin) for rows in (q, k))
    y = varlen_attention(q, k, v, cu_seqlens, scale=scale, window=window, backend=backend)
    y = F.linear(y.flatten(1), weights[3], biases[3])
    return add_norm(y, residual, norm_weight, norm_bias, eps=eps, backend=backend)


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of rows [T, heads, head_dim]."""
    lower, upper = rows.chunk(2, -1)
    turned = torch.cat([-upper, lower], -1)
    return (rows * cos[:, None] + turned * sin[:, None]).to(rows.dtype)


def _reference(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return in_steps("torch", x, *arguments)


backends.register("attention_block", "torch", _reference)
