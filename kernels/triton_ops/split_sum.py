"""The last step of a sum that was divided into runs: adds their sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .numerics import cast

_BLOCK = 1024


@triton.jit(do_not_specialize=["splits"])
def split_sum_kernel(partial_ptr, out_ptr, splits, size, BLOCK: tl.constexpr):
    """[splits, size] -> [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for split in range(0, splits):
        run = partial_ptr + tl.cast(split, tl.int64) * size
        total += tl.load(run + at, mask=at < size, other=0)
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=at < size)


def split_sum(partial: Tensor, out: Tensor) -> Tensor:
    """``out[...] = partial.sum(0)``, rounded to out's dtype; bitwise repeatable.

    Args:
        partial: [splits, ...], contiguous, in the dtype to sum in.
        out: the same shape without ``splits``, contiguous; it is returned.
    """
    if out.numel():
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        split_sum_kernel[grid](partial, out, partial.shape[0], out.numel(), BLOCK=_BLOCK)
    return out
