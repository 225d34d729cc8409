"""expert_mlp: sends every token through the MLPs of its K experts, and sums with its weights.

    z   = W1[e] . x + b1[e]                      (gated: z = [z1, z2], first half activated)
    h   = act(z)                                 (gated: h = act(z1) * z2; "clamped_swiglu" changes
                                                  both, see moe_fast/ops/activations.py)
    f_e = W2[e] . h + b2[e]
    y_t = sum over k of w[t, k] * f_{e(t, k)}(x_t)

There are T tokens of dimension D and E experts of hidden size H; w are the routing weights.

Backward, for a row of expert e with upstream gradient dO (before the weight w):

    dh = dO . W2[e];  dw = <dh, h> + <dO, b2[e]>;  dz = w * dh * act'(z)
    dW2[e] = sum of (w dO)^T h;  db2[e] = sum of w dO;  dW1[e] = sum of dz^T x;  db1[e] = sum of dz
    dx = sum over k of dz . W1[e]

Only x and z are saved; the backward pass computes h again from z. ``recompute="up"`` saves only x.

Source: the expert of Hallee et al., arXiv 2401.15713; saving x and z as in SonicMoE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    check_tensor,
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
    """Compute the mixture of expert MLPs; see the module's docstring for the mathematics.

    Args:
        x: [T, D].
        up_proj: [E, H, D]; gated: [E, 2H, D], activated half first, or the halves apart,
            [E, 2, H, D], as a view of interleaved rows has them.
        down_proj: [E, D, H].
        up_proj_bias, down_proj_bias: [E, H] (gated [E, 2H]) and [E, D], or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        act: one of :data:`moe_fast.ops.activations.ACTIVATIONS`, transformers' names.
        gated: whether experts are gated.
        recompute: ``None``, or ``"up"`` to compute z again in the backward pass instead of saving
            it (less memory, one more product).
        dtype: the dtype to compute in, as if x, weights and biases were cast to it; the forward
            pass in C++ makes no copy of the weights. ``None``: x's dtype, or autocast's.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in ``dtype``, else in x's dtype (autocast's under autocast). Skipped slots contribute
        exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names do not fit.
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
def _prepare(x: Tensor, *arguments: Any) -> tuple[Callable, bool]:
    """Check the arguments; return the implementation to run, and whether it has gradients."""
    *tensors_and_settings, backend = arguments
    return choose("expert_mlp", backend, (), x, *tensors_and_settings, apart=True)


def choose(
    op: str,
    backend: str | None,
    block: tuple[Tensor, ...],
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
    dtype: torch.dtype | None = None,
    *,
    apart: bool = False,
) -> tuple[Callable, bool]:
    """Check the arguments of an expert MLP; return the implementation of ``op`` to run.

    Args:
        block: further tensors that may need gradients, in an op that computes more than the MLP.
        dtype: the dtype to compute in, in an op that lets the caller choose it.
        apart: whether the op takes an up_proj whose halves are apart, [E, 2, H, D].

    Returns:
        The implementation, and whether gradients are needed.

    Raises:
        ValueError, TypeError: the tensors do not fit each other; the message names the argument.
    """
    check_choice("act", act, ACTIVATIONS)
    check_choice("recompute", recompute, (None, "up"))
    check_shape("x", x, (None, None), "[T, D]")
    check_shape("down_proj", down_proj, (None, x.shape[1], None), "[E, D, H]")
    num_experts, dim, hidden = down_proj.shape
    if not (dim and hidden):
        raise ValueError(f"D and H must be at least 1; got {dim} and {hidden}.")
    _check_up_projection(up_proj, up_proj_bias, (num_experts, hidden, dim), gated, apart)
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
    if dtype is not None:
        check_choice(
            "dtype", dtype, (d for d in FLOAT_DTYPES if torch.promote_types(x.dtype, d) == d)
        )
    check_plan(x, top_k_weights, plan, num_experts)
    needs_grad = wants_gradients(
        x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights, *block
    )
    computed_in = torch.promote_types(dtype or autocast_dtype(x), top_k_weights.dtype)
    act = ACTIVATIONS[act].name
    return backends.select(op, backend, x.device, computed_in, act, needs_grad), needs_grad


def _check_up_projection(
    up_proj: Tensor, bias: Tensor | None, sizes: tuple[int, int, int], gated: bool, apart: bool
) -> None:
    num_experts, hidden, dim = sizes
    up_rows = 2 * hidden if gated else hidden
    letters = "[E, 2H, D]" if gated else "[E, H, D]"
    check_tensor("up_proj", up_proj)
    if apart and gated and up_proj.dim() == 4:
        check_shape("up_proj", up_proj, (num_experts, 2, hidden, dim), "[E, 2, H, D]")
    else:
        check_shape("up_proj", up_proj, (num_experts, up_rows, dim), letters)
    if bias is not None:
        check_shape("up_proj_bias", bias, (num_experts, up_rows), letters[:-4] + "]")
