"""int8_linear in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.int8_weight import Int8Weight, linear, normalized


def _int8_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: str,
) -> Tensor:
    y = linear(x, Int8Weight(values, scale, sums), bias, input_range)
    return normalized(y, residual, norm_weight, norm_bias, eps).to(getattr(torch, dtype))


def _fake(x, values, scale, *rest):
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=getattr(torch, rest[-1]))


OPERATION = Operation(_int8_linear, _fake)
backends.register(
    "int8_linear", "torch", OPERATION.implement("int8_linear", _int8_linear), gradients=False
)
