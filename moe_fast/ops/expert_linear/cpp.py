"""expert_linear in C++, on the CPU: kernels/csrc/cpu/expert_linear.cpp."""

from __future__ import annotations

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.expert_linear.reference import OPERATION

run = OPERATION.implement(
    "expert_linear_cpp", native.kernel("expert_linear"), native.kernel("expert_linear_backward")
)
backends.register("expert_linear", "cpp", run, native.why_no_products, dtypes=COMPILED_DTYPES)
