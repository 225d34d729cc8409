"""int8_expert_mlp in PyTorch: a loop over the experts."""

from __future__ import annotations

from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.activations import activate
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.int8_weight import Int8Weight, expert_of, linear, normalized
from moe_fast.ops.plan_checks import combine, experts_with_rows


def _int8_expert_mlp(
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
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    act: str,
    gated: bool,
) -> Tensor:
    up, down = (
        Int8Weight(up_values, up_scale, up_sums),
        Int8Weight(down_values, down_scale, down_sums),
    )
    rows = down_scale.new_zeros(row_to_token.shape[0], x.shape[1])
    for e, here in experts_with_rows(expert_offsets):
        z = linear(x[row_to_token[here]], *expert_of(up, up_bias, e), input_range)
        h = activate(z, act, gated)
        rows[here] = linear(h, *expert_of(down, down_bias, e), hidden_range)
    y = combine(rows, slot_to_row, top_k_weights)
    return normalized(y, residual, norm_weight, norm_bias, eps).to(x.dtype)


def _fake(x, *rest):
    return x.new_empty(x.shape)


OPERATION = Operation(_int8_expert_mlp, _fake)
backends.register(
    "int8_expert_mlp",
    "torch",
    OPERATION.implement("int8_expert_mlp", _int8_expert_mlp),
    gradients=False,
)
