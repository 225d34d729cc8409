"""expert_linear: applies one linear map per expert, and sums with the routing weights.

    y_t = sum over k of w[t, k] * (W[e] . x_t + b[e]),   e = e(t, k)

T tokens visit K of E experts each; W[e] is [O, I]. The targets "intermediate" and "output" of
:class:`moe_fast.MoEMLP` use it for the one projection of the MLP that is replicated.

Backward, for a row of expert e with upstream gradient dO (before the weight w), u = dO . W[e]:

    dx = sum over k of w * u;  dw = <u, x> + <dO, b[e]>
    dW[e] = sum of (w dO)^T x;  db[e] = sum of w dO

Source: Yu, arXiv 2412.17364.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    autocast_to,
    check_dtype,
    check_like,
    check_shape,
    wants_gradients,
)
from moe_fast.ops.expert_linear import cpp, reference, triton  # noqa: F401 - each registers itself
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.plan_checks import check_plan


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compute the mixture of linear maps; see the module's docstring for the mathematics.

    Args:
        x: [T, I].
        weight: [E, O, I].
        bias: [E, O] or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, O] in x's dtype (autocast's under autocast). Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    run = _prepare(x, weight, bias, top_k_weights, plan, backend)
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast_to(x, weight, bias)
    return run(x, weight, bias, top_k_weights, *plan.indices)


@once_per_signature
def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("x", x, (None, None), "[T, I]")
    check_shape("weight", weight, (None, None, x.shape[1]), "[E, O, I]")
    if not (weight.shape[1] and weight.shape[2]):
        raise ValueError(f"O and I must be at least 1; got {list(weight.shape[1:])}.")
    if bias is not None:
        check_shape("bias", bias, tuple(weight.shape[:2]), "[E, O]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_like("x", x, weight=weight, bias=bias)
    check_plan(x, top_k_weights, plan, weight.shape[0])
    computed_in = torch.promote_types(autocast_dtype(x), top_k_weights.dtype)
    needs_grad = wants_gradients(x, weight, bias, top_k_weights)
    return backends.select("expert_linear", backend, x.device, computed_in, gradients=needs_grad)
