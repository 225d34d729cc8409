"""int8_expert_linear: :func:`moe_fast.ops.expert_linear` in 8-bit integers, for inference.

    y_t = sum over k of w[t, k] * (W[e] x_t + b[e]),   e = e(t, k)

Each W[e] x_t is computed as by :func:`moe_fast.ops.int8_linear`; the sums over k are float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape
from moe_fast.ops.int8_expert_linear import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.int8_weight import (
    Int8Weight,
    check_inference,
    check_range,
    check_rows,
    check_weight,
)
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.plan_checks import check_plan


def int8_expert_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    input_range: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the mixture of linear maps; see the module's docstring for the mathematics.

    Args:
        x: [T, I] float32, bfloat16, float16 or float64.
        weight: of an [E, O, I] tensor, from :func:`moe_fast.ops.quantize_weight`.
        bias: [E, O] float32 or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        input_range: as in :func:`moe_fast.ops.int8_linear`.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, O] in x's dtype. Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or gradients are needed.
    """
    run = _prepare(x, *weight, bias, top_k_weights, plan, input_range, backend)
    check_range("input_range", input_range)
    return run(x, *weight, bias, input_range, top_k_weights, *plan.indices)


@once_per_signature
def _prepare(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    input_range: Tensor | None,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("x", x, (None, None), "[T, I]")
    check_dtype("x", x, FLOAT_DTYPES)
    num_experts = values.shape[0]
    rows = check_weight("weight", Int8Weight(values, scale, sums), (num_experts,), x.shape[1])
    check_rows(bias=(bias, rows), input_range=(input_range, (2,)))
    check_like("x", x, dtype=False, values=values, scale=scale, sums=sums, bias=bias)
    check_plan(x, top_k_weights, plan, num_experts)
    check_inference("int8_expert_linear", x, top_k_weights)
    computed_in = torch.promote_types(x.dtype, top_k_weights.dtype)
    return backends.select("int8_expert_linear", backend, x.device, computed_in)
