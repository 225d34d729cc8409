"""Rows back to tokens, then BERT's output block; forward and backward are one pass each.

    y[t]   = sum over k of w[t, k] * rows[slot_to_row[t, k]]
    s[t]   = residual[t] + scale * keep[t] * y[t]                  keep: 0 where dropout drops
    out[t] = gamma * n + beta,  n = (s - mean(s)) / sqrt(var(s) + eps)

Backward, with g = gamma * dout:

    ds = (g - mean(g) - n * mean(g * n)) / sqrt(var + eps);  dresidual = ds
    dy = scale * keep * ds;  dgamma = sum of dout * n;  dbeta = sum of dout

s is rounded before its moments are computed, so that the backward, which reads s, computes the same
n. Sums over tokens are computed for runs of tokens, then added in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, row_major, triton_dtype
from .numerics import cast
from .split_sum import split_sum

# The elements of each tensor that a program holds, and the most programs that sum over tokens.
_ELEMENTS, _MOST_RUNS = 2048, 528


@triton.jit(do_not_specialize=["T"])
def combine_norm_kernel(
    rows_ptr,  # [S, N]
    weight_ptr,  # [T, K]
    slot_to_row_ptr,  # [S]
    residual_ptr,  # [T, N]
    keep_ptr,  # [T, N] bool
    gamma_ptr,  # [N]
    beta_ptr,  # [N]
    out_ptr,  # [T, N]
    sum_ptr,  # [T, N] s
    moments_ptr,  # [2, T] mean, 1 / deviation
    T,
    K,
    N,
    DROPS: tl.constexpr,
    SAVE: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens, all of their columns."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    at, mask = token[:, None] * N + n[None, :], (token < T)[:, None] & (n < N)[None, :]
    total = tl.zeros((ROWS, BLOCK), ACC)
    for k in range(0, K):
        row = tl.load(slot_to_row_ptr + token * K + k, mask=token < T, other=-1)
        weight = tl.load(weight_ptr + token * K + k, mask=row >= 0, other=0).to(ACC)
        here = (row >= 0)[:, None] & (n < N)[None, :]
        value = tl.load(rows_ptr + row[:, None] * N + n[None, :], mask=here, other=0).to(ACC)
        total += weight[:, None] * value
    if DROPS:
        total *= tl.load(keep_ptr + at, mask=mask, other=0).to(ACC) * SCALE
    total += tl.load(residual_ptr + at, mask=mask, other=0).to(ACC)
    rounded = cast(total, out_ptr.dtype.element_ty)
    total = rounded.to(ACC)
    mean = tl.sum(total, 1) / N
    centred = tl.where((n < N)[None, :], total - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N + EPS)
    gamma = tl.load(gamma_ptr + n, mask=n < N, other=0).to(ACC)
    beta = tl.load(beta_ptr + n, mask=n < N, other=0).to(ACC)
    out = centred * inverse[:, None] * gamma[None, :] + beta[None, :]
    tl.store(out_ptr + at, cast(out, out_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(sum_ptr + at, rounded, mask=mask)
        tl.store(moments_ptr + token, mean, mask=token < T)
        tl.store(moments_ptr + T + token, inverse, mask=token < T)


@triton.jit(do_not_specialize=["T", "run"])
def combine_norm_backward_kernel(
    grad_ptr,  # [T, N] dout
    sum_ptr,  # [T, N]
    moments_ptr,  # [2, T]
    keep_ptr,  # [T, N] bool
    gamma_ptr,  # [N]
    grad_sum_ptr,  # [T, N] ds
    grad_y_ptr,  # [T, N]
    partial_ptr,  # [runs, 2, N] dgamma, dbeta
    T,
    N,
    run,  # tokens per program, a multiple of ROWS
    stride_grad,
    DROPS: tl.constexpr,
    STORE_Y: tl.constexpr,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A run of tokens, all of their columns."""
    n = tl.arange(0, BLOCK)
    gamma = tl.load(gamma_ptr + n, mask=n < N, other=0).to(ACC)
    grad_gamma = tl.zeros((BLOCK,), ACC)
    grad_beta = tl.zeros((BLOCK,), ACC)
    first = tl.program_id(0).to(tl.int64) * run
    for start in range(0, run, ROWS):
        token = first + start + tl.arange(0, ROWS)
        at, mask = token[:, None] * N + n[None, :], (token < T)[:, None] & (n < N)[None, :]
        grad = tl.load(grad_ptr + token[:, None] * stride_grad + n[None, :], mask=mask, other=0)
        grad = grad.to(ACC)
        mean = tl.load(moments_ptr + token, mask=token < T, other=0)
        inverse = tl.load(moments_ptr + T + token, mask=token < T, other=0)
        total = tl.load(sum_ptr + at, mask=mask, other=0).to(ACC)
        normal = tl.where(mask, (total - mean[:, None]) * inverse[:, None], 0.0)
        grad_gamma += tl.sum(grad * normal, 0)
        grad_beta += tl.sum(grad, 0)
        grad *= gamma[None, :]
        along = tl.sum(grad * normal, 1) / N
        grad = (grad - (tl.sum(grad, 1) / N)[:, None] - normal * along[:, None]) * inverse[:, None]
        tl.store(grad_sum_ptr + at, cast(grad, grad_sum_ptr.dtype.element_ty), mask=mask)
        if STORE_Y:
            if DROPS:
                grad *= tl.load(keep_ptr + at, mask=mask, other=0).to(ACC) * SCALE
            tl.store(grad_y_ptr + at, cast(grad, grad_y_ptr.dtype.element_ty), mask=mask)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * N + n
    tl.store(partial, grad_gamma, mask=n < N)
    tl.store(partial + N, grad_beta, mask=n < N)


def _tile(n: int) -> dict[str, int]:
    """ROWS, BLOCK and num_warps for rows of n columns."""
    block = triton.next_power_of_2(n)
    # Two at most: with four rows of 512 and dropout, the compiler spilled 8 bytes on sm_80.
    rows = max(1, min(2, _ELEMENTS // block))
    return dict(ROWS=rows, BLOCK=block, num_warps=min(16, max(4, block // 1024)))


def combine_norm(
    rows: Tensor,
    slot_to_row: Tensor,
    weights: Tensor,
    residual: Tensor,
    keep: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    *,
    scale: float,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output block over the combined rows.

    Args:
        rows: [S, N] contiguous; skipped rows are not read.
        slot_to_row: [S] int64, -1 = skipped.
        weights: [T, K] contiguous, float32 or float64.
        residual: [T, N], any float dtype.
        keep: [T, N] bool contiguous, True where dropout keeps an entry; ``None``: all are kept.
        gamma, beta: [N] contiguous.
        scale: the factor of the kept entries of y; it has no effect without ``keep``.
        save: whether the backward will be called; otherwise s and the moments are empty.

    Returns:
        out [T, N] in the residual's dtype; s, as out; mean and 1 / deviation [2, T] in the
        accumulator's dtype.
    """
    (num_tokens, k), n = weights.shape, rows.shape[1]
    residual = residual.contiguous()
    out = residual.new_empty(num_tokens, n)
    total = residual.new_empty(num_tokens if save else 0, n)
    acc = accumulator(rows.dtype)
    moments = residual.new_empty(2, num_tokens if save else 0, dtype=acc)
    if out.numel():
        tile = _tile(n)
        combine_norm_kernel[(triton.cdiv(num_tokens, tile["ROWS"]),)](
            rows,
            weights,
            slot_to_row,
            residual,
            keep,
            gamma,
            beta,
            out,
            total,
            moments,
            num_tokens,
            k,
            n,
            DROPS=keep is not None,
            SAVE=save,
            SCALE=scale,
            EPS=eps,
            ACC=triton_dtype(acc),
            **tile,
        )
    return out, total, moments


def combine_norm_backward(
    grad: Tensor,
    total: Tensor,
    moments: Tensor,
    keep: Tensor | None,
    gamma: Tensor,
    *,
    scale: float,
    like: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, residual, gamma and beta.

    Args:
        grad: [T, N], the gradient of out, in its dtype.
        total, moments: s and its moments, of :func:`combine_norm`.
        like: a tensor of y's dtype.

    Returns:
        dy [T, N] in y's dtype (the same tensor as dresidual where the two are equal);
        dresidual [T, N]; dgamma and dbeta [N] in gamma's dtype.
    """
    num_tokens, n = total.shape
    grad_sum = total.new_empty(num_tokens, n)
    own_y = keep is not None or like.dtype != total.dtype
    grad_y = like.new_empty(num_tokens, n) if own_y else grad_sum
    sums = gamma.new_empty(2, n)
    if not n:
        return grad_y, grad_sum, sums[0], sums[1]
    tile = _tile(n)
    run = triton.cdiv(triton.cdiv(num_tokens, _MOST_RUNS), tile["ROWS"]) * tile["ROWS"]
    runs = triton.cdiv(num_tokens, run) if run else 0
    partial = total.new_empty(runs, 2, n, dtype=moments.dtype)
    if runs:
        grad = row_major(grad)
        combine_norm_backward_kernel[(runs,)](
            grad,
            total,
            moments,
            keep,
            gamma,
            grad_sum,
            grad_y,
            partial,
            num_tokens,
            n,
            run,
            grad.stride(0),
            DROPS=keep is not None,
            STORE_Y=own_y,
            SCALE=scale,
            ACC=triton_dtype(moments.dtype),
            **tile,
        )
    split_sum(partial, sums)
    return grad_y, grad_sum, sums[0], sums[1]
