"""expert_mlp_norm on a GPU: expert_mlp's products, then one pass for everything that follows.

Rows stay in the experts' order until that pass, also for K = 1. It reads them by token, so they
need not be stored in token order, nor be 0 for skipped tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.expert_mlp import triton as expert_mlp


def forward(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    keep: Tensor | None,
    scale: float,
    eps: float,
    act: str,
    gated: bool,
    save: bool,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute out [T, D]; for the backward pass also s, its moments and z (else without rows)."""
    from moe_fast.triton_ops.combine_norm import combine_norm

    weights = (up_proj, down_proj, up_proj_bias, down_proj_bias)
    indices = (expert_offsets, row_to_token, row_to_slot, slot_to_row)
    order = expert_mlp.order_of(x, *indices)
    rows, z = expert_mlp.expert_rows(x, weights, order, act, gated, save_z)
    block = (residual, keep, norm_weight.contiguous(), norm_bias.contiguous())
    w = top_k_weights.contiguous()
    out, total, moments = combine_norm(
        rows, order.slot_to_row, w, *block, scale=scale, eps=eps, save=save
    )
    return out, total, moments, z


def gradients(grad_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of expert_mlp's six tensors, residual, norm_weight and norm_bias."""
    from moe_fast.triton_ops.combine_norm import combine_norm_backward

    *mlp, _, norm_weight, _ = inputs[:9]
    *plan, keep, total, moments, z, scale, _, act, gated = inputs[9:]
    grad_y, grad_residual, grad_norm_weight, grad_norm_bias = combine_norm_backward(
        grad_out, total, moments, keep, norm_weight.contiguous(), scale=scale, like=mlp[0]
    )
    grads = expert_mlp.gradients(grad_y, *mlp, *plan, z, act, gated)
    return *grads, grad_residual, grad_norm_weight.clone(), grad_norm_bias.clone()


def _fake(x, up_proj, *rest):
    residual, row_to_token = rest[4], rest[8]
    save, save_z = rest[-2:]
    tokens = x.shape[0] if save else 0
    rows = expert_mlp.saved_rows(x, row_to_token, up_proj.shape[0])
    moments_in = torch.promote_types(x.dtype, torch.float32)
    return (
        residual.new_empty(residual.shape),
        residual.new_empty((tokens, x.shape[1])),
        residual.new_empty((2, tokens), dtype=moments_in),
        x.new_empty((rows if save_z else 0, up_proj.shape[1])),
    )


def _fake_backward(grad_out, x, up_proj, down_proj, up_bias, down_bias, top_k_weights, *rest):
    residual, norm_weight, norm_bias = rest[:3]
    like = (x, up_proj, down_proj, x, x, top_k_weights, residual, norm_weight, norm_bias)
    shapes = [t.shape for t in like]
    shapes[3:5] = up_proj.shape[:2], down_proj.shape[:2]
    return tuple(t.new_empty(shape) for t, shape in zip(like, shapes, strict=True))


_OPERATION = Operation(
    forward, _fake, _fake_backward, differentiable=9, saved=(1, 2, 3), settings=4
)
run = _OPERATION.implement(
    "expert_mlp_norm_triton",
    triton_backend.on_device(forward),
    triton_backend.on_device(gradients),
)
triton_backend.offer("expert_mlp_norm", run)
