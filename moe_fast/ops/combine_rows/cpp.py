"""combine_rows in C++: kernels/csrc/cpu/rows.cpp and kernels/csrc/cuda/rows.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.combine_rows.reference import OPERATION


def _combine_rows(
    rows: Tensor, top_k_weights: Tensor, expert_offsets: Tensor, slot_to_row: Tensor
) -> Tensor:
    return native.call(torch.ops.moe_fast_cpp.combine_rows, rows, top_k_weights, slot_to_row)


combine_rows = OPERATION.implement(
    "combine_rows_cpp", _combine_rows, native.kernel("combine_rows_backward")
)
backends.register(
    "combine_rows",
    "cpp",
    combine_rows,
    native.why_unavailable,
    dtypes=COMPILED_DTYPES,
)
