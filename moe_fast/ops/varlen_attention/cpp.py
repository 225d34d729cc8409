"""varlen_attention in C++, on the CPU, for inference: kernels/csrc/cpu/attention.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.eager_dispatch import Operation


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    dropout: float,  # always 0: registered without dropout below
    max_length: int | None,
) -> Tensor:
    # Views are read in place if the elements of a row are contiguous.
    rows = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    starts = cu_seqlens.to(torch.int64).contiguous()
    op = torch.ops.moe_fast_cpp.varlen_attention
    return native.call_on_views(op, *rows, starts, scale, window)


def _fake(query, *others):
    return query.new_empty(query.shape)


backends.register(
    "varlen_attention",
    "cpp",
    Operation(_attention, _fake).implement("varlen_attention_cpp", _attention),
    native.why_no_products,
    dtypes=COMPILED_DTYPES,
    gradients=False,
    dropout=False,
)
