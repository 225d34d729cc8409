"""The router: logits, the K best experts and their weights.

    logits = x . Wr^T;  the K largest, equal ones in order of expert id;  weights from a softmax

Experts are chosen per token by its logits, or per sentence by the mean logits of its real tokens.
Padding is never read: its logits and weights are 0, its ids E. All computation is in float32
(float64 for float64); float32 products are never rounded to TF32. Sums over programs are added in a
fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import row_major
from .numerics import dot
from .split_sum import split_sum
from .top_k import (
    DIM,
    TOKENS,
    RouteSettings,
    chosen_by,
    expert_columns,
    kth,
    real_tokens,
    sentence_bounds,
    sentence_scores,
    weights_of,
)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [E, D]
    mask_ptr,  # [T] bool
    logits_ptr,  # [T, E]
    weights_ptr,  # [T, K]
    index_ptr,  # [T, K]
    counts_ptr,  # [programs, E]
    T,
    D,
    E,
    stride_x,
    stride_w,
    HAS_MASK: tl.constexpr,
    CHOOSE: tl.constexpr,
    SAME_DTYPE: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_MODE: tl.constexpr,
    DENSE: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Computes logits of ROWS tokens, with CHOOSE also their experts, in the same pass over x."""
    ACC: tl.constexpr = logits_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, E_BLOCK)
    real = token < T
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + token, mask=token < T, other=0) != 0)
    logits = tl.zeros((ROWS, E_BLOCK), ACC)
    for start in range(0, D, DIM):
        d = start + tl.arange(0, DIM)
        x = x_ptr + token[:, None] * stride_x + d[None, :]
        w = w_ptr + column.to(tl.int64)[None, :] * stride_w + d[:, None]
        x_tile = tl.load(x, mask=real[:, None] & (d < D)[None, :], other=0)
        w_tile = tl.load(w, mask=(column < E)[None, :] & (d < D)[:, None], other=0)
        if not SAME_DTYPE:
            x_tile, w_tile = x_tile.to(ACC), w_tile.to(ACC)
        logits = dot(x_tile, w_tile, logits, "ieee")
    # A router weight that is not finite would give 0 * inf = NaN for padding.
    logits = tl.where(real[:, None], logits, 0.0)
    mask = (token < T)[:, None] & (column < E)[None, :]
    tl.store(logits_ptr + token[:, None] * E + column[None, :], logits, mask=mask)
    if CHOOSE:
        chosen = chosen_by(logits, E, K, DENSE)
        weights = weights_of(logits, chosen, E, WEIGHT_MODE)
        columns, available = expert_columns(logits, E)
        for k in range(K):
            best = kth(logits, available, columns, k, DENSE)
            here = columns == best[:, None]
            available = available & (here == 0)
            weight = tl.where(real, tl.sum(tl.where(here, weights, 0.0), 1), 0.0)
            tl.store(weights_ptr + token * K + k, weight, mask=token < T)
            index = tl.where(real, best, E).to(tl.int64)
            tl.store(index_ptr + token * K + k, index, mask=token < T)
        counts = tl.sum((chosen & real[:, None]).to(tl.int64), 0)
        tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * E + column, counts, mask=column < E)


@triton.jit(do_not_specialize=["T", "B"])
def sentence_kernel(
    logits_ptr,  # [T, E]
    mask_ptr,  # [T] bool
    starts_ptr,  # [B + 1]
    weights_ptr,  # [T, K]
    index_ptr,  # [T, K]
    counts_ptr,  # [B, E]
    T,
    B,
    E,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_MODE: tl.constexpr,
    DENSE: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Chooses the experts of one sentence, and writes them for each of its tokens."""
    first, end = sentence_bounds(starts_ptr, T, B)
    scores, count = sentence_scores(logits_ptr, mask_ptr, first, end, E, HAS_MASK, E_BLOCK, ROWS)
    chosen = chosen_by(scores, E, K, DENSE)
    weights = weights_of(scores, chosen, E, WEIGHT_MODE)
    columns, available = expert_columns(scores, E)
    for k in range(K):
        best = kth(scores, available, columns, k, DENSE)
        here = columns == best[:, None]
        available = available & (here == 0)
        weight = tl.sum(tl.where(here, weights, 0.0), 1)
        for start in range(first, end, ROWS):
            token = start + tl.arange(0, ROWS)
            real = real_tokens(mask_ptr, token, end, HAS_MASK)
            tl.store(weights_ptr + token * K + k, tl.where(real, weight, 0.0), mask=token < end)
            index = tl.where(real, best, E).to(tl.int64)
            tl.store(index_ptr + token * K + k, index, mask=token < end)
    column = tl.arange(0, E_BLOCK)
    counts = tl.sum(chosen.to(tl.int64), 0) * count
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * E + column, counts, mask=column < E)


def route(
    x: Tensor,
    router_weight: Tensor,
    settings: RouteSettings,
    mask: Tensor | None,
    starts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns weights [T, K], logits [T, E], ids [T, K] int64 and tokens per expert [E] int64.

    Args:
        x: [T, D].
        router_weight: [E, D].
        mask: [T] bool, True for real tokens, or ``None``.
        starts: [B + 1] int64, where sentences start; needed by ``settings.sentences``.
        dtype: of logits and weights, float32 or float64.
    """
    num_tokens, (num_experts, dim) = x.shape[0], router_weight.shape
    logits = x.new_empty(num_tokens, num_experts, dtype=dtype)
    weights = x.new_empty(num_tokens, settings.k, dtype=dtype)
    index = x.new_empty(num_tokens, settings.k, dtype=torch.int64)
    counts = x.new_zeros(num_experts, dtype=torch.int64)
    if not num_tokens:
        return weights, logits, index, counts
    blocks = triton.cdiv(num_tokens, TOKENS)
    programs = blocks
    if settings.sentences:
        assert starts is not None
        programs = starts.shape[0] - 1
    partial = counts.new_empty(programs, num_experts)
    x, router_weight = row_major(x), row_major(router_weight)
    common = dict(**settings.meta(num_experts), HAS_MASK=mask is not None, ROWS=TOKENS)
    logits_kernel[(blocks,)](
        x,
        router_weight,
        mask,
        logits,
        weights,
        index,
        partial,
        num_tokens,
        dim,
        num_experts,
        x.stride(0),
        router_weight.stride(0),
        CHOOSE=not settings.sentences,
        SAME_DTYPE=x.dtype == router_weight.dtype,
        DIM=DIM,
        **common,
    )
    if settings.sentences:
        sentence_kernel[(programs,)](
            logits,
            mask,
            starts,
            weights,
            index,
            partial,
            num_tokens,
            programs,
            num_experts,
            **common,
        )
    return weights, logits, index, split_sum(partial, counts)
