"""Backward of the router: from the gradients of weights and logits to those of x and Wr.

    dlogits: the gradient through the softmax, plus that of the router's own losses
    dx = dlogits . Wr;  dWr = dlogits^T x

In sentence modes each real token contributes 1/count to the mean of its sentence. The gradient of
padding is 0, and padding does not contribute to others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import row_major
from .numerics import cast, dot
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
    softmax,
)

_MOST_SPLITS = 128  # the most runs of tokens in the sum of the router's gradient


@triton.jit
def _scores_grad(scores, spread, chosen, E, WEIGHT_MODE: tl.constexpr):
    """Gradient of the scores, given ``spread``, the gradient of the chosen experts' weights."""
    if WEIGHT_MODE == "one":
        return tl.zeros_like(scores)
    _, expert = expert_columns(scores, E)
    weight = softmax(scores, chosen if WEIGHT_MODE == "renormalize" else expert)
    if WEIGHT_MODE == "straight_through":  # of log p
        return spread - weight * tl.sum(spread, 1)[:, None]
    return weight * (spread - tl.sum(weight * spread, 1)[:, None])


@triton.jit(do_not_specialize=["T"])
def token_grad_kernel(
    grad_weights_ptr,  # [T, K]
    grad_logits_ptr,  # [T, E]
    logits_ptr,  # [T, E]
    mask_ptr,  # [T] bool
    out_ptr,  # [T, E]
    T,
    E,
    HAS_MASK: tl.constexpr,
    K: tl.constexpr,
    WEIGHT_MODE: tl.constexpr,
    DENSE: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of the logits where experts are chosen per token."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = token[:, None] * E + tl.arange(0, E_BLOCK)[None, :]
    real = real_tokens(mask_ptr, token, T, HAS_MASK)
    mask = real[:, None] & (tl.arange(0, E_BLOCK) < E)[None, :]
    scores = tl.load(logits_ptr + at, mask=mask, other=0)
    columns, available = expert_columns(scores, E)
    spread = tl.zeros_like(scores)
    for k in range(K):
        here = columns == kth(scores, available, columns, k, DENSE)[:, None]
        available = available & (here == 0)
        grad = tl.load(grad_weights_ptr + token * K + k, mask=real, other=0)
        spread += tl.where(here, grad[:, None], 0.0)
    grad = _scores_grad(scores, spread, chosen_by(scores, E, K, DENSE), E, WEIGHT_MODE)
    grad += tl.load(grad_logits_ptr + at, mask=mask, other=0)
    grad = tl.where(real[:, None], grad, 0.0)
    stored = (token < T)[:, None] & (tl.arange(0, E_BLOCK) < E)[None, :]
    tl.store(out_ptr + at, grad, mask=stored)


@triton.jit(do_not_specialize=["T", "B"])
def sentence_grad_kernel(
    grad_weights_ptr,  # [T, K]
    grad_logits_ptr,  # [T, E]
    logits_ptr,  # [T, E]
    mask_ptr,  # [T] bool
    starts_ptr,  # [B + 1]
    out_ptr,  # [T, E]
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
    """Gradient of the logits of one sentence's tokens, each of which is 1/count of the mean."""
    first, end = sentence_bounds(starts_ptr, T, B)
    scores, count = sentence_scores(logits_ptr, mask_ptr, first, end, E, HAS_MASK, E_BLOCK, ROWS)
    columns, available = expert_columns(scores, E)
    spread = tl.zeros_like(scores)
    for k in range(K):
        here = columns == kth(scores, available, columns, k, DENSE)[:, None]
        available = available & (here == 0)
        total = tl.zeros((1,), scores.dtype)
        for start in range(first, end, ROWS):
            token = start + tl.arange(0, ROWS)
            real = real_tokens(mask_ptr, token, end, HAS_MASK)
            grads = tl.load(grad_weights_ptr + token * K + k, mask=real, other=0)
            total += tl.sum(grads, 0)
        spread += tl.where(here, total[:, None], 0.0)
    grad = _scores_grad(scores, spread, chosen_by(scores, E, K, DENSE), E, WEIGHT_MODE)
    share = grad / tl.maximum(count, 1).to(scores.dtype)
    column = tl.arange(0, E_BLOCK)
    for start in range(first, end, ROWS):
        token = start + tl.arange(0, ROWS)
        real = real_tokens(mask_ptr, token, end, HAS_MASK)
        at = token[:, None] * E + column[None, :]
        own = tl.load(grad_logits_ptr + at, mask=real[:, None] & (column < E)[None, :], other=0)
        value = tl.where(real[:, None], own + share, 0.0)
        tl.store(out_ptr + at, value, mask=(token < end)[:, None] & (column < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def input_grad_kernel(
    grad_ptr,  # [T, E] of the logits
    w_ptr,  # [E, D]
    out_ptr,  # [T, D]
    T,
    D,
    E,
    stride_w,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """``dx = dlogits . Wr``."""
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    column = tl.arange(0, E_BLOCK)
    grad = grad_ptr + token[:, None] * E + column[None, :]
    grad = tl.load(grad, mask=(token < T)[:, None] & (column < E)[None, :], other=0)
    w = w_ptr + column.to(tl.int64)[:, None] * stride_w + d[None, :]
    w = tl.load(w, mask=(column < E)[:, None] & (d < D)[None, :], other=0).to(ACC)
    value = dot(grad, w, tl.zeros((ROWS, DIM), ACC), "ieee")
    mask = (token < T)[:, None] & (d < D)[None, :]
    out = out_ptr + token[:, None] * D + d[None, :]
    tl.store(out, cast(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "run"])
def weight_grad_kernel(
    grad_ptr,  # [T, E] of the logits
    x_ptr,  # [T, D]
    mask_ptr,  # [T] bool
    out_ptr,  # [runs, E, D]
    T,
    D,
    E,
    run,  # tokens per run, a multiple of ROWS
    stride_x,
    HAS_MASK: tl.constexpr,
    E_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
):
    """``dWr = dlogits^T x`` over one run of tokens."""
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    column = tl.arange(0, E_BLOCK)
    first = tl.program_id(0).to(tl.int64) * run
    end = tl.minimum(first + run, T)
    total = tl.zeros((E_BLOCK, DIM), ACC)
    for start in range(first, end, ROWS):
        token = start + tl.arange(0, ROWS)
        real = real_tokens(mask_ptr, token, end, HAS_MASK)
        grad = grad_ptr + token[None, :] * E + column[:, None]
        grad = tl.load(grad, mask=real[None, :] & (column < E)[:, None], other=0)
        x = x_ptr + token[:, None] * stride_x + d[None, :]
        x = tl.load(x, mask=real[:, None] & (d < D)[None, :], other=0).to(ACC)
        total = dot(grad, x, total, "ieee")
    out = out_ptr + (tl.program_id(0).to(tl.int64) * E + column)[:, None] * D + d[None, :]
    tl.store(out, total, mask=(column < E)[:, None] & (d < D)[None, :])


def route_backward(
    grad_weights: Tensor,
    grad_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    settings: RouteSettings,
    mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, D] and of the router's weight [E, D], in their dtypes.

    Args:
        grad_weights, grad_logits: [T, K] and [T, E], for the first two results of :func:`route`.
        logits: of :func:`route`.
        x, router_weight, settings, mask, starts: as in :func:`route`.
    """
    (num_tokens, dim), num_experts = x.shape, router_weight.shape[0]
    grad_x = x.new_empty(num_tokens, dim)
    grad_weight = router_weight.new_zeros(num_experts, dim)
    if not num_tokens or not dim:
        return grad_x, grad_weight
    blocks, columns = triton.cdiv(num_tokens, TOKENS), triton.cdiv(dim, DIM)
    common = dict(**settings.meta(num_experts), HAS_MASK=mask is not None, ROWS=TOKENS)
    grad = torch.empty_like(logits)  # 0 for padding
    tensors = (grad_weights.contiguous(), grad_logits.contiguous(), logits, mask)
    if settings.sentences:
        assert starts is not None
        sentences = starts.shape[0] - 1
        sentence_grad_kernel[(sentences,)](
            *tensors, starts, grad, num_tokens, sentences, num_experts, **common
        )
    else:
        token_grad_kernel[(blocks,)](*tensors, grad, num_tokens, num_experts, **common)
    x, router_weight = row_major(x), row_major(router_weight)
    tile = dict(E_BLOCK=common["E_BLOCK"], ROWS=TOKENS, DIM=DIM)
    input_grad_kernel[(blocks, columns)](
        grad,
        router_weight,
        grad_x,
        num_tokens,
        dim,
        num_experts,
        router_weight.stride(0),
        **tile,
    )
    run = triton.cdiv(blocks, _MOST_SPLITS) * TOKENS
    runs = triton.cdiv(num_tokens, run)
    partial = grad.new_empty(runs, num_experts, dim)
    weight_grad_kernel[(runs, columns)](
        grad,
        x,
        mask,
        partial,
        num_tokens,
        dim,
        num_experts,
        run,
        x.stride(0),
        HAS_MASK=mask is not None,
        **tile,
    )
    return grad_x, split_sum(partial, grad_weight)
