"""expert_mlp in C++, on the CPU: kernels/csrc/cpu/expert_mlp.cpp and expert_mlp_backward.cpp."""

from __future__ import annotations

import torch

from moe_fast.ops import backends, native
from moe_fast.ops.expert_mlp.reference import OPERATION

run = OPERATION.implement(
    "expert_mlp_cpp", native.kernel("expert_mlp"), native.kernel("expert_mlp_backward")
)
backends.register(
    "expert_mlp", "cpp", run, native.why_no_products, leaves_to_torch=(torch.float64,)
)
