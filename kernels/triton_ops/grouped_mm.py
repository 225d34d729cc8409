"""The grouped products by ``torch.nn.functional.grouped_mm``, where a tuning table names it.

grouped_mm takes contiguous rows and the experts' end rows on the device; the host does not wait.
Rows to gather are copied first. Bias, routing weight and the store in token order are another pass
(``row_epilogue.py``). Rows after the last expert's are not written, as in our own kernel.

A kernel of ours writes the zero gradient of experts without rows, because on compute capability
10.0 grouped_mm leaves values there (pytorch issue 172439).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, aligned
from .row_epilogue import row_epilogue

_BLOCK = 1024


def grouped_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    plan: Plan,
    by_token: Tensor | None,
    *,
    gather: bool,
) -> Tensor:
    """As :func:`.linear.linear`, which scatters to ``by_token``."""
    expert_offsets, row_to_token, _ = plan
    a = aligned(a.index_select(0, row_to_token) if gather else a)
    ends = expert_offsets[1:].to(torch.int32)
    rows = F.grouped_mm(a, aligned(weight).mT, offs=ends)
    if bias is None and row_weights is None and by_token is None:
        return rows
    return row_epilogue(rows, bias, row_weights, plan, by_token)


def grouped_weight(
    a: Tensor,
    b: Tensor,
    row_weights: Tensor | None,
    plan: Plan,
    *,
    gather_a: bool,
    gather_b: bool,
) -> Tensor:
    """As :func:`.grad_weight.grad_weight`."""
    expert_offsets, row_to_token, _ = plan
    if not row_to_token.shape[0]:  # grouped_mm refuses zero rows
        return a.new_zeros(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1])
    a = aligned(a.index_select(0, row_to_token) if gather_a else a)
    b = aligned(b.index_select(0, row_to_token) if gather_b else b)
    if row_weights is not None:
        a = row_epilogue(a, None, row_weights, plan)
    out = F.grouped_mm(a.mT, b, offs=expert_offsets[1:].to(torch.int32))
    return zero_empty(out, expert_offsets)


@triton.jit
def zero_empty_kernel(out_ptr, offsets_ptr, size, BLOCK: tl.constexpr):
    """Writes zeros to out [E, size] for experts without rows; other programs return at once."""
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(offsets_ptr + expert + 1) > tl.load(offsets_ptr + expert):
        return
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert * size + at, zeros, mask=at < size)


def zero_empty(out: Tensor, expert_offsets: Tensor) -> Tensor:
    """Writes zeros to contiguous ``out`` [E, M, N] for experts without rows, and returns it."""
    size = out.shape[1] * out.shape[2]
    if out.numel():
        grid = (out.shape[0], triton.cdiv(size, _BLOCK))
        zero_empty_kernel[grid](out, expert_offsets, size, BLOCK=_BLOCK)
    return out
