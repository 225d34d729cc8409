"""expert_mlp in PyTorch: a loop over the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.activations import activate, activate_backward
from moe_fast.ops.checks import without_autocast
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.expert_mlp.plain_weights import backward_on_plain, forward_on_plain
from moe_fast.ops.plan_checks import combine, experts_with_rows, slot_values


@without_autocast
@forward_on_plain
def _expert_mlp(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    act: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(row_to_token.shape[0], x.shape[1])
    saved = x.new_empty(row_to_token.shape[0] if save else 0, up_proj.shape[1])
    for e, here in experts_with_rows(expert_offsets):
        z = F.linear(x[row_to_token[here]], up_proj[e], _of(up_proj_bias, e))
        rows[here] = F.linear(activate(z, act, gated), down_proj[e], _of(down_proj_bias, e))
        if save:
            saved[here] = z
    saved[expert_offsets[-1] :] = 0  # skipped rows: an op must not return uninitialised memory
    return combine(rows, slot_to_row, top_k_weights), saved


def _of(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


@without_autocast
@backward_on_plain
def _expert_mlp_backward(grad_y, x, up_proj, down_proj, *rest):
    up_proj_bias, down_proj_bias, top_k_weights, *plan, saved, act, gated = rest
    expert_offsets, row_to_token, row_to_slot, slot_to_row = plan
    # Experts without rows keep the zeros; the gradients of absent biases are not read.
    grad_up, grad_down = up_proj.new_zeros(up_proj.shape), down_proj.new_zeros(down_proj.shape)
    grad_up_bias = x.new_zeros(up_proj.shape[:2])
    grad_down_bias = x.new_zeros(down_proj.shape[:2])
    grad_rows = x.new_empty(row_to_token.shape[0], x.shape[1])
    grad_row_weights = top_k_weights.new_empty(row_to_token.shape[0])
    row_weights = top_k_weights.reshape(-1)[row_to_slot]
    for e, here in experts_with_rows(expert_offsets):
        rows_x, grad_out = x[row_to_token[here]], grad_y[row_to_token[here]]
        z = saved[here] if saved.shape[0] else F.linear(rows_x, up_proj[e], _of(up_proj_bias, e))
        h = activate(z, act, gated)
        grad_h = grad_out @ down_proj[e]
        weight = row_weights[here, None]
        grad_row_weights[here] = (grad_h.to(weight.dtype) * h).sum(-1)
        if down_proj_bias is not None:
            grad_row_weights[here] += grad_out.to(weight.dtype) @ down_proj_bias[e].to(weight.dtype)
        grad_z = activate_backward((grad_h * weight).to(x.dtype), z, act, gated)
        grad_out = (grad_out * weight).to(x.dtype)
        grad_down[e], grad_down_bias[e] = grad_out.t() @ h, grad_out.sum(0)
        grad_up[e], grad_up_bias[e] = grad_z.t() @ rows_x, grad_z.sum(0)
        grad_rows[here] = grad_z @ up_proj[e]
    grad_weights = slot_values(grad_row_weights, slot_to_row, top_k_weights.shape)
    grad_x = combine(grad_rows, slot_to_row, torch.ones_like(top_k_weights))
    return grad_x, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights


def _fake(x, up_proj, down_proj, *rest):
    row_to_token, gated, save = rest[4], *rest[-2:]
    saved_rows = row_to_token.shape[0] if save else 0
    return x.new_empty(x.shape), x.new_empty((saved_rows, _up_rows(down_proj, gated)))


def _fake_backward(
    grad_y, x, up_proj, down_proj, up_proj_bias, down_proj_bias, top_k_weights, *rest
):
    bias_shape = (up_proj.shape[0], _up_rows(down_proj, rest[-1]))
    return (
        x.new_empty(x.shape),
        up_proj.new_empty(up_proj.shape),
        down_proj.new_empty(down_proj.shape),
        (x if up_proj_bias is None else up_proj_bias).new_empty(bias_shape),
        (x if down_proj_bias is None else down_proj_bias).new_empty(down_proj.shape[:2]),
        top_k_weights.new_empty(top_k_weights.shape),
    )


def _up_rows(down_proj: Tensor, gated: bool) -> int:
    return down_proj.shape[2] * (2 if gated else 1)


OPERATION = Operation(_expert_mlp, _fake, _fake_backward, differentiable=6, saved=(1,), settings=2)
backends.register(
    "expert_mlp", "torch", OPERATION.implement("expert_mlp", _expert_mlp, _expert_mlp_backward)
)
