"""expert_mlp in C++, on the CPU: kernels/csrc/cpu/expert_mlp.cpp and expert_mlp_backward.cpp."""

from __future__ import annotations

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.expert_mlp.reference import OPERATION

run = OPERATION.implement(
    "expert_mlp_cpp", native.kernel("expert_mlp"), native.kernel("expert_mlp_backward")
)
backends.register("expert_mlp", "cpp", run, native.why_no_products, dtypes=COMPILED_DTYPES)
