"""int8_expert_mlp in C++, on the CPU: kernels/csrc/cpu/int8_experts.cpp."""

from __future__ import annotations

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.int8_expert_mlp.reference import OPERATION

backends.register(
    "int8_expert_mlp",
    "cpp",
    OPERATION.implement("int8_expert_mlp_cpp", native.kernel("int8_expert_mlp")),
    native.why_not_on_cpu,
    dtypes=COMPILED_DTYPES,
    gradients=False,
    note=lambda _: f"products by {native.int8_capability}",
)
