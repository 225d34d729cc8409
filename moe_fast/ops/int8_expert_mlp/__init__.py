"""int8_expert_mlp: :func:`moe_fast.ops.expert_mlp` in 8-bit integers, for inference.

    z = W1[e] x + b1[e],   h = act(z), gated act(z1) * z2,   f_e = W2[e] h + b2[e]
    y_t = sum over k of w[t, k] * f_{e(t, k)}(x_t)

Both products are computed as by :func:`moe_fast.ops.int8_linear`: x and h are quantised row by row.
z, h and the sums over k are float32. With ``norm`` the result is ``LayerNorm(y + residual)``.

Backend ``cpp`` gathers, quantises, multiplies, activates, quantises again, multiplies, weights and
normalises blocks of an expert's rows, which stay in the cache (kernels/csrc/cpu/int8_experts.cpp).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.activations import ACTIVATIONS
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import FLOAT_DTYPES, check_choice, check_dtype, check_like, check_shape
from moe_fast.ops.int8_expert_mlp import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.int8_weight import (
    Int8Norm,
    Int8Weight,
    check_inference,
    check_norm,
    check_range,
    check_rows,
    check_weight,
)
from moe_fast.ops.plan import RoutingPlan
from moe_fast.ops.plan_checks import check_plan


def int8_expert_mlp(
    x: Tensor,
    up_proj: Int8Weight,
    down_proj: Int8Weight,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    *,
    act: str = "gelu",
    gated: bool = False,
    input_range: Tensor | None = None,
    hidden_range: Tensor | None = None,
    norm: Int8Norm | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the mixture of expert MLPs; see the module's docstring for the mathematics.

    Args:
        x: [T, D] float32, bfloat16, float16 or float64.
        up_proj: of an [E, H, D] tensor, gated [E, 2H, D] with the activated half first, from
            :func:`moe_fast.ops.quantize_weight`.
        down_proj: of an [E, D, H] tensor.
        up_proj_bias, down_proj_bias: [E, H] (gated [E, 2H]) and [E, D] float32, or ``None``.
        top_k_weights: [T, K] float32 or float64, from :func:`route`.
        plan: from :func:`plan` of the same route.
        act, gated: as in :func:`moe_fast.ops.expert_mlp`.
        input_range, hidden_range: of x and h, as in :func:`moe_fast.ops.int8_linear`.
        norm: what follows, in the same pass; its residual is [T, D] in x's dtype.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in x's dtype. Skipped slots contribute exactly 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names do not fit, or gradients are needed.
    """
    norm = norm or Int8Norm()
    tensors = (x, *up_proj, up_proj_bias, input_range, *down_proj, down_proj_bias, hidden_range)
    run = _prepare(*tensors, top_k_weights, plan, *norm[:3], act, gated, backend)
    check_range("input_range", input_range)
    check_range("hidden_range", hidden_range)
    return run(*tensors, top_k_weights, *plan.indices, *norm, ACTIVATIONS[act].name, gated)


@once_per_signature
def _prepare(
    x: Tensor,
    up_values: Tensor,
    up_scale: Tensor,
    up_sums: Tensor,
    up_bias: Tensor | None,
    input_range: Tensor | None,
    down_values: Tensor,
    down_scale: Tensor,
    down_sums: Tensor,
    down_bias: Tensor | None,
    hidden_range: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    act: str,
    gated: bool,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_choice("act", act, ACTIVATIONS)
    check_shape("x", x, (None, None), "[T, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    up, down = (
        Int8Weight(up_values, up_scale, up_sums),
        Int8Weight(down_values, down_scale, down_sums),
    )
    lead = (up_values.shape[0],)
    up_rows = check_weight("up_proj", up, lead, x.shape[1])
    if gated and up_rows[1] % 2:
        raise ValueError(f"up_proj must have 2H rows if gated, an even number; got {up_rows[1]}.")
    down_rows = check_weight("down_proj", down, lead, up_rows[1] // 2 if gated else up_rows[1])
    if down_rows[1] != x.shape[1]:
        raise ValueError(f"down_proj must have D = {x.shape[1]} rows; got {down_rows[1]}.")
    check_rows(
        up_proj_bias=(up_bias, up_rows),
        down_proj_bias=(down_bias, down_rows),
        input_range=(input_range, (2,)),
        hidden_range=(hidden_range, (2,)),
    )
    check_norm(residual, norm_weight, norm_bias, tuple(x.shape), x.dtype)
    check_like(
        "x",
        x,
        dtype=False,
        up_values=up_values,
        up_scale=up_scale,
        up_sums=up_sums,
        up_proj_bias=up_bias,
        down_values=down_values,
        down_scale=down_scale,
        down_sums=down_sums,
        down_proj_bias=down_bias,
    )
    check_plan(x, top_k_weights, plan, up_values.shape[0])
    check_inference("int8_expert_mlp", x, top_k_weights, residual)
    computed_in = torch.promote_types(x.dtype, top_k_weights.dtype)
    return backends.select("int8_expert_mlp", backend, x.device, computed_in, ACTIVATIONS[act].name)
