"""add_norm in C++, on the CPU, for inference: kernels/csrc/cpu/add_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.eager_dispatch import Operation


def add_norm(
    y: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the rows, and their float32 values: without rows if these are the same."""
    rounds = y.dtype != torch.float32
    op = torch.ops.moe_fast_cpp.add_norm
    return native.call(op, y, residual, weight, bias, eps, rounds)


def fake(y, *_):
    """Empty results of the right shapes."""
    rows = 0 if y.dtype == torch.float32 else y.shape[0]
    return y.new_empty(y.shape), y.new_empty((rows, y.shape[1]), dtype=torch.float32)


backends.register(
    "add_norm",
    "cpp",
    Operation(add_norm, fake).implement("add_norm_cpp", add_norm),
    native.why_not_on_cpu,
    dtypes=COMPILED_DTYPES,
    gradients=False,
)
