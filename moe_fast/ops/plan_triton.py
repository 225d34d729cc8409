"""plan on a GPU: Triton's counting sort, for machines without a compiled extension."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.plan import check_not_negative, fake


@torch.library.custom_op("moe_fast::plan_triton", mutates_args=())
@triton_backend.on_device
def _plan_op(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_fast.triton_ops import plan

    check_not_negative(top_k_index)
    return plan.plan(top_k_index, num_experts)


_plan_op.register_fake(fake)
triton_backend.offer("plan", _plan_op)
