"""Settings that launchers derive from their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# The order in which experts see their rows, as launchers take it: expert_offsets [E + 1],
# row_to_token [S] and row_to_slot [S], int64.
Plan = Sequence[Tensor]
# Rows and columns of the kernels that only copy, sum or scale.
ROWS, COLUMNS = 16, 128


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as ``torch.backends.cuda.matmul`` says."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def triton_dtype(dtype: torch.dtype) -> Any:
    """``torch.float32`` -> ``tl.float32``, for a kernel's constexpr arguments."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def row_major(tensor: Tensor) -> Tensor:
    """``tensor`` with its last dimension contiguous; copied only if that is not so already.

    Expanded tensors (stride 0), such as the gradient of a sum, are copied too.
    """
    contiguous = tensor.stride(-1) == 1 and tensor.stride(0) >= tensor.shape[-1]
    return tensor if contiguous or tensor.numel() == 0 else tensor.contiguous()


def expert_block(num_experts: int) -> int:
    """E rounded up to a power of two, at least 16: one kernel serves all E up to 16."""
    return max(16, triton.next_power_of_2(num_experts))


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` in a layout that hardware can copy by tiles; copied only if it has another one.

    One dimension is contiguous; the start and all other strides are multiples of 16 bytes. The
    sizes must be such multiples already.
    """
    strides = sorted(tensor.stride())
    steps = [stride * tensor.itemsize for stride in strides[1:]]
    fits = strides[0] == 1 and all(step and step % 16 == 0 for step in steps)
    if fits and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
