"""route in C++, on the CPU, in two passes over the tokens: kernels/csrc/cpu/route.cpp."""

from __future__ import annotations

import torch

from moe_fast.ops import backends, native
from moe_fast.ops.route.reference import OPERATION

run = OPERATION.implement("route_cpp", native.kernel("route"), native.kernel("route_backward"))
backends.register("route", "cpp", run, native.why_not_on_cpu, leaves_to_torch=(torch.float64,))
