"""gather_rows in C++: kernels/csrc/cpu/rows.cpp and kernels/csrc/cuda/rows.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.combine_rows.cpp import combine_rows
from moe_fast.ops.gather_rows.reference import implement


def _gather_rows(
    x: Tensor, expert_offsets: Tensor, row_to_token: Tensor, slot_to_row: Tensor
) -> Tensor:
    return native.call(torch.ops.moe_fast_cpp.gather_rows, x, expert_offsets, row_to_token)


backends.register(
    "gather_rows",
    "cpp",
    implement("gather_rows_cpp", _gather_rows, combine_rows),
    native.why_unavailable,
    dtypes=COMPILED_DTYPES,
)
