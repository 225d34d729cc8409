"""expert_linear in PyTorch: a loop over the experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import without_autocast
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.plan_checks import combine, experts_with_rows, slot_values


@without_autocast
def _expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> Tensor:
    rows = x.new_empty(row_to_token.shape[0], weight.shape[1])
    for e, here in experts_with_rows(expert_offsets):
        row_bias = None if bias is None else bias[e]
        rows[here] = F.linear(x[row_to_token[here]], weight[e], row_bias)
    return combine(rows, slot_to_row, top_k_weights)


@without_autocast
def _expert_linear_backward(grad_y, x, weight, bias, top_k_weights, *plan):
    expert_offsets, row_to_token, row_to_slot, slot_to_row = plan
    # Experts without rows keep the zeros; the gradient of an absent bias is not read.
    grad_weight, grad_bias = weight.new_zeros(weight.shape), x.new_zeros(weight.shape[:2])
    grad_rows = x.new_empty(row_to_token.shape[0], x.shape[1])
    grad_row_weights = top_k_weights.new_empty(row_to_token.shape[0])
    for e, here in experts_with_rows(expert_offsets):
        rows_x, grad_out = x[row_to_token[here]], grad_y[row_to_token[here]]
        grad_rows[here] = grad_out @ weight[e]
        row_weight = top_k_weights.reshape(-1)[row_to_slot[here]]
        grad_row_weights[here] = (grad_rows[here].to(row_weight.dtype) * rows_x).sum(-1)
        if bias is not None:
            dtype = row_weight.dtype
            grad_row_weights[here] += grad_out.to(dtype) @ bias[e].to(dtype)
        grad_out = (grad_out * row_weight[:, None]).to(x.dtype)
        grad_weight[e], grad_bias[e] = grad_out.t() @ rows_x, grad_out.sum(0)
    grad_x = combine(grad_rows, slot_to_row, top_k_weights)
    grad_weights = slot_values(grad_row_weights, slot_to_row, top_k_weights.shape)
    return grad_x, grad_weight, grad_bias, grad_weights


def _fake(x, weight, *rest):
    return x.new_empty((x.shape[0], weight.shape[1]))


def _fake_backward(grad_y, x, weight, bias, top_k_weights, *rest):
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(weight.shape[:2]),
        top_k_weights.new_empty(top_k_weights.shape),
    )


OPERATION = Operation(_expert_linear, _fake, _fake_backward, differentiable=4)
backends.register(
    "expert_linear",
    "torch",
    OPERATION.implement("expert_linear", _expert_linear, _expert_linear_backward),
)
