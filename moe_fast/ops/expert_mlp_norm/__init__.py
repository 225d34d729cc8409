"""expert_mlp_norm: computes the mixture of expert MLPs, then BERT's output block.

    y   = expert_mlp(x)
    s   = residual + dropout(y)
    out = LayerNorm(s) = norm_weight * (s - mean(s)) / sqrt(var(s) + eps) + norm_bias

Backends ``torch`` and ``cpp`` compute it in these steps. ``triton`` sums a token's rows, drops,
adds and normalises in one pass (``kernels/triton_ops/combine_norm.py``). Its backward pass computes
the gradients of y and of the residual in one pass, and continues with that of expert_mlp. Besides
x, z and the residual it saves s, two numbers per token, and the mask of dropout.

torch draws the mask before an implementation runs. So all of them drop the same entries, which are
those that ``torch.nn.functional.dropout`` would drop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops.activations import ACTIVATIONS
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    autocast_to,
    check_dtype,
    check_like,
    check_shape,
)
from moe_fast.ops.expert_mlp import choose
from moe_fast.ops.expert_mlp_norm import reference, triton  # noqa: F401 - each registers itself
from moe_fast.ops.plan import RoutingPlan


def expert_mlp_norm(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    plan: RoutingPlan,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout: float = 0.0,
    act: str = "gelu",
    gated: bool = False,
    recompute: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute ``LayerNorm(dropout(expert_mlp(x)) + residual)``; see the module's docstring.

    Args:
        x, up_proj, down_proj, up_proj_bias, down_proj_bias: as in :func:`moe_fast.ops.expert_mlp`.
        top_k_weights, plan, act, gated, recompute: as in :func:`moe_fast.ops.expert_mlp`.
        residual: [T, D].
        norm_weight, norm_bias: [D], LayerNorm's gamma and beta.
        eps: is added to the variance.
        dropout: the probability with which an entry of y is dropped; 0 outside of training.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, D] in x's dtype; under autocast in float32, like LayerNorm (float64 stays float64). A
        slot that is assigned no expert contributes 0; a token all of whose slots are empty gives
        ``LayerNorm(residual)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or names do not fit.
    """
    tensors = (x, up_proj, down_proj, up_proj_bias, down_proj_bias)
    block: tuple[Tensor, ...] = (residual, norm_weight, norm_bias)
    mlp = (*tensors, top_k_weights, plan, act, gated, recompute)
    run, needs_grad = _prepare(*mlp, *block, dropout, backend)
    if torch.is_autocast_enabled(x.device.type):
        # Cast the MLP's tensors as autocast does for products, the block's as for LayerNorm.
        tensors, block = autocast_to(*tensors), _as_layer_norm(*block)
    return run(
        *tensors,
        top_k_weights,
        *block,
        *plan.indices,
        None if dropout == 0 else _kept(tensors[0], dropout),
        1 / (1 - dropout) if dropout < 1 else 0.0,
        eps,
        ACTIVATIONS[act].name,
        gated,
        needs_grad,
        needs_grad and recompute is None,
    )[0]


@once_per_signature
def _prepare(x: Tensor, *arguments: Any) -> tuple[Callable, bool]:
    """Check the arguments; return the implementation to run, and whether it has gradients."""
    *mlp, residual, norm_weight, norm_bias, dropout, backend = arguments
    block = (residual, norm_weight, norm_bias)
    chosen = choose("expert_mlp_norm", backend, block, x, *mlp)
    _check_block(x, *block, dropout)
    return chosen


def _check_block(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, dropout: float
) -> None:
    check_shape("residual", residual, tuple(x.shape), "[T, D]")
    check_dtype("residual", residual, FLOAT_DTYPES)
    check_shape("norm_weight", norm_weight, (x.shape[1],), "[D]")
    check_shape("norm_bias", norm_bias, (x.shape[1],), "[D]")
    check_like("x", x, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability, 0 to 1; got {dropout}.")


def _as_layer_norm(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to float32, as autocast does for LayerNorm; float64 stays float64."""
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def _kept(x: Tensor, dropout: float) -> Tensor:
    """Draw the mask [T, D] bool of what dropout keeps, from the device's generator."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
