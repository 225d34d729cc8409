"""add_norm: the sum and the norm at the end of a post-norm block, for inference.

    s   = y + residual
    out = LayerNorm(s) = weight * (s - mean(s)) / sqrt(var(s) + eps) + bias

The residual may be float32 where y is bfloat16 or float16, and ``exact`` is the float32 value of
which ``out`` is rounded. A layer that passes ``exact`` on as the next residual rounds only what it
multiplies: the errors of the sums do not add up over the layers.

Backend ``cpp`` is a forward pass on the CPU (kernels/csrc/cpu/add_norm.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.add_norm import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    check_dtype,
    check_like,
    check_shape,
    wants_gradients,
)


class Normed(NamedTuple):
    """The normalised rows.

    Attributes:
        out: [T, D] in the dtype of the rows.
        exact: [T, D], the same before rounding: float32, or float64 for float64.
    """

    out: Tensor
    exact: Tensor


def add_norm(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Normed:
    """Compute ``LayerNorm(y + residual)``; see the module's docstring.

    Args:
        y: [T, D].
        residual: [T, D], in y's dtype or float32.
        weight, bias: [D]; LayerNorm's gamma and beta. A bias of ``None`` stands for zeros.
        eps: is added to the variance.
        backend: see :func:`moe_fast.use_backend`. If gradients are needed, PyTorch runs the call.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    run = _prepare(y, residual, weight, bias, backend)
    out, exact = run(y, residual, weight, bias, eps)
    return Normed(out, exact if exact.shape == out.shape else out)


@once_per_signature
def _prepare(
    y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("y", y, (None, None), "[T, D]")
    check_dtype("y", y, FLOAT_DTYPES)
    check_block_end(y, residual, weight, bias)
    gradients = wants_gradients(y, residual, weight, bias)
    return backends.select("add_norm", backend, y.device, y.dtype, gradients=gradients)


def check_block_end(y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the residual and the norm's parameters suit rows like ``y`` [T, D]."""
    check_shape("residual", residual, tuple(y.shape), "[T, D]")
    check_dtype("residual", residual, (y.dtype, torch.float32))
    check_shape("norm weight", weight, (y.shape[1],), "[D]")
    check_dtype("norm weight", weight, FLOAT_DTYPES)
    if bias is not None:
        check_shape("norm bias", bias, (y.shape[1],), "[D]")
        check_dtype("norm bias", bias, FLOAT_DTYPES)
    check_like("y", y, dtype=False, residual=residual, weight=weight, bias=bias)
