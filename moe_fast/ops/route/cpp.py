"""route in C++, on the CPU, in two passes over the tokens: kernels/csrc/cpu/route.cpp."""

from __future__ import annotations

from typing import Any

import torch

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.route.reference import NonFiniteLogitsError, implement


def _route(*args: Any) -> Any:
    try:
        return native.call(torch.ops.moe_fast_cpp.route, *args)
    except ValueError as error:
        if str(error).startswith(NonFiniteLogitsError.START):
            raise NonFiniteLogitsError(str(error)) from None
        raise


run = implement("route_cpp", _route, native.kernel("route_backward"))
backends.register("route", "cpp", run, native.why_not_on_cpu, dtypes=COMPILED_DTYPES)
