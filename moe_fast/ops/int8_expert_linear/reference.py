"""int8_expert_linear in PyTorch: a loop over the experts."""

from __future__ import annotations

from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.int8_weight import Int8Weight, expert_of, linear
from moe_fast.ops.plan_checks import combine, experts_with_rows


def _int8_expert_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    top_k_weights: Tensor,
    expert_offsets: Tensor,
    row_to_token: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> Tensor:
    weight = Int8Weight(values, scale, sums)
    rows = scale.new_zeros(row_to_token.shape[0], scale.shape[1])
    for e, here in experts_with_rows(expert_offsets):
        rows[here] = linear(x[row_to_token[here]], *expert_of(weight, bias, e), input_range)
    return combine(rows, slot_to_row, top_k_weights).to(x.dtype)


def _fake(x, values, scale, *rest):
    return x.new_empty((x.shape[0], scale.shape[1]))


OPERATION = Operation(_int8_expert_linear, _fake)
backends.register(
    "int8_expert_linear",
    "torch",
    OPERATION.implement("int8_expert_linear", _int8_expert_linear),
    gradients=False,
)
