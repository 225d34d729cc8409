"""plan on a GPU: Triton's counting sort, for machines without a compiled extension."""

from __future__ import annotations

from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.plan.reference import OPERATION, check_not_negative


@triton_backend.on_device
def _plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    from moe_fast.triton_ops import plan

    check_not_negative(top_k_index)
    return plan.plan(top_k_index, num_experts)


triton_backend.offer("plan", OPERATION.implement("plan_triton", _plan))
