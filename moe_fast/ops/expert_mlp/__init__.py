"""expert_mlp: every token through the MLPs of its K experts, summed with its routing weights.

    z   = W1[e] . x + b1[e]                      (gated: z = [z1, z2], first half activated)
    h   = act(z)                                 (gated: h = act(z1) * z2; "clamped_swiglu" changes
                                                  both, see moe_fast/ops/activations.py)
    f_e = W2[e] . h + b2[e]
    y_t = sum over k of w[t, k] * f_{e(t, k)}(x_t)

Backward, for a row of expert e with upstream gradient dO (before the weight w):

    dh = dO . W2[e];  dw = <dh, h> + <dO, b2[e]>;  dz = w * dh * act'(z)
    dW2[e] = sum of (w dO)^T h;  db2[e] = sum of w dO;  dW1[e] = sum of dz^T x;  db1[e] = sum of dz
    dx = sum over k of dz . W1[e]

Only x and z are saved; h is computed again from z. ``recompute="up"`` saves x alone.

Source: the expert of Hallee et al., arXiv 2401.15713; saving x and z as in SonicMoE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.activations import ACTIVATIONS
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    autocast_dtype,
    autocast_to,
    check_choice,
    check_dtype,
    check_like,
    check_shape,
    wants_gradients,
)
from moe_fast.ops.expert_mlp import cpp, reference, triton  # noqa: F401 - each registers itself
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.plan_checks import check_plan


def expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    act: str = "gelu",
    gated: bool = False,
    recompute: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mixture of expert MLPs; see the module's docstring for the mathematics.

    Args:
        x: [T, D].
        up_proj: [E, H, D]; gated: [E, 2H, D], activated half first, or the halves apart,
            [E, 2, H, D]: pairs of rows are then a view.
        down_proj: [E, D, H].
        up_proj_bias, down_proj_bias: [E, H] (gated [E, 2H]) and [E, D], or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        act: one of :data:`moe_fast.ops.activations.ACTIVATIONS`, transformers' names.
        recompute: ``None``, or ``"up"`` to compute z again in the backward instead of saving it
            (less memory, one more product).
        dtype: what to compute in, as if x, weights and biases were cast to it; the forward in C++
            makes no copy of the weights. ``None``: x's dtype, or autocast's.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in ``dtype``, else in x's dtype (autocast's under autocast). Skipped slots contribute
        exactly 0.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or names that do not fit.
    """
    tensors = (x, up_proj, down_proj, up_proj_bias, down_proj_bias)
    run, needs_grad = _prepare(*tensors, top_k_weights, plan, act, gated, recompute, dtype, backend)
    if dtype is not None:
        tensors = (x.to(dtype), *tensors[1:])
    elif torch.is_autocast_enabled(x.device.type):
        tensors = autocast_to(*tensors)
    save = needs_grad and recompute is None
    y, _ = run(*tensors, top_k_weights, *plan.indices, ACTIVATIONS[act].name, gated, save)
    return y


@once_per_signature
def _prepare(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    act: str,
    gated: bool,
    recompute: str | None,
    dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Callable, bool]:
    """The implementation for such a call, and whether it has gradients."""
    weights = (up_proj, down_proj, up_proj_bias, down_proj_bias)
    check_expert_mlp(x, *weights, top_k_weights, plan, act, gated, recompute, apart=True)
    if dtype is not None and torch.promote_types(x.dtype, dtype) != dtype:
        raise TypeError(f"dtype must be as wide as x's, {x.dtype}, or wider; got {dtype}.")
    needs_grad = wants_gradients(x, *weights, top_k_weights)
    computed_in = torch.promote_types(dtype or autocast_dtype(x), top_k_weights.dtype)
    act = ACTIVATIONS[act].name
    run = backends.select("expert_mlp", backend, x.device, computed_in, act, needs_grad)
    return run, needs_grad


def check_expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    act: str,
    gated: bool,
    recompute: str | None,
    apart: bool = False,
) -> None:
    """Raise unless the tensors of an expert MLP fit each other, naming the argument.

    ``apart``: up_proj may be [E, 2, H, D].
    """
    check_choice("act", act, ACTIVATIONS)
    check_choice("recompute", recompute, (None, "up"))
    check_shape("x", x, (None, None), "[T, D]")
    check_shape("down_proj", down_proj, (None, x.shape[1], None), "[E, D, H]")
    num_experts, dim, hidden = down_proj.shape
    if not (dim and hidden):
        raise ValueError(f"D and H must be at least 1; got {dim} and {hidden}.")
    up_rows = 2 * hidden if gated else hidden
    letters = "[E, 2H, D]" if gated else "[E, H, D]"
    if apart and gated and up_proj.dim() == 4:
        check_shape("up_proj", up_proj, (num_experts, 2, hidden, dim), "[E, 2, H, D]")
    else:
        check_shape("up_proj", up_proj, (num_experts, up_rows, dim), letters)
    if up_proj_bias is not None:
        check_shape("up_proj_bias", up_proj_bias, (num_experts, up_rows), letters[:-4] + "]")
    if down_proj_bias is not None:
        check_shape("down_proj_bias", down_proj_bias, (num_experts, dim), "[E, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_like(
        "x",
        x,
        up_proj=up_proj,
        down_proj=down_proj,
        up_proj_bias=up_proj_bias,
        down_proj_bias=down_proj_bias,
    )
    check_plan(x, top_k_weights, plan, num_experts)
