"""attention_block in C++, on the CPU, for inference: kernels/csrc/cpu/attention_block.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.attention_block.reference import in_steps
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.eager_dispatch import Operation

# With fewer tokens than this share of the weights' rows, packing the weights for the products takes
# longer than it saves; see docs/kernels-cpu.md.
_TOKENS_PER_ROW = 1 / 8


def _attention_block(
    x: Tensor,
    residual: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    scale: float,
    window: int | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    weights = (q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias)
    settings = (heads, scale, window, eps)
    rounds = x.dtype != torch.float32
    if x.shape[0] < _TOKENS_PER_ROW * sum(weight.shape[0] for weight in weights[:4]):
        norm = (norm_weight, norm_bias)
        steps = in_steps("cpp", x, residual, *weights, *norm, cu_seqlens, cos, sin, *settings)
        return steps[0], steps[1] if rounds else x.new_empty((0, x.shape[1]))
    starts = cu_seqlens.to(torch.int64)
    op = torch.ops.moe_fast_cpp.attention_block
    block = (norm_weight, norm_bias, starts, cos, sin)
    return native.call(op, x, residual, *weights, *block, *settings, rounds)


def _fake(x, *_):
    rows = 0 if x.dtype == torch.float32 else x.shape[0]
    return x.new_empty(x.shape), x.new_empty((rows, x.shape[1]), dtype=torch.float32)


backends.register(
    "attention_block",
    "cpp",
    Operation(_attention_block, _fake).implement("attention_block_cpp", _attention_block),
    native.why_no_products,
    dtypes=COMPILED_DTYPES,
    gradients=False,
)
