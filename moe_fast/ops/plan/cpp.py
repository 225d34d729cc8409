"""plan in C++, a parallel counting sort: kernels/csrc/cpu/plan.cpp, kernels/csrc/cuda/plan.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.plan.reference import OPERATION, check_not_negative


def _plan(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    if top_k_index.device.type != "cpu":  # on the CPU the sort itself finds negative ids
        check_not_negative(top_k_index)
    return native.call(torch.ops.moe_fast_cpp.plan, top_k_index, num_experts)


backends.register("plan", "cpp", OPERATION.implement("plan_cpp", _plan), native.why_unavailable)
