"""The router: logits, the K best experts and their weights, and the backward.

    logits = x . Wr^T;  the K largest, equal ones in order of expert id;  weights from a softmax

A token chooses by its own logits, or a sentence by the mean over its real tokens. Padding is never
read: its logits and weights are 0, its ids E. Everything runs in float32 (float64 for float64);
float32 products are never rounded to TF32. Sums over programs are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import row_major
from .numerics import SMALLEST_DOT, cast, dot
from .split_sum import split_sum

_TOKENS, _DIM = 32, 64  # tile of the products
_MOST_SPLITS = 128  # runs of tokens that the router's gradient is summed over


@dataclass(frozen=True)
class RouteSettings:
    """What the kernels need to know beside their tensors.

    Attributes:
        k: experts per token; E where ``dense``.
        weight_mode: "renormalize", "probability", "straight_through" or "one".
        sentences: choose by sentence means.
        dense: visit all experts in order.
    """

    k: int
    weight_mode: str
    sentences: bool
    dense: bool

    def meta(self, num_experts: int) -> dict:
        """As constexpr arguments of the kernels."""
        return dict(
            K=self.k,
            WEIGHT_MODE=self.weight_mode,
            DENSE=self.dense,
            E_BLOCK=max(SMALLEST_DOT, triton.next_power_of_2(num_experts)),
        )


@triton.jit
def _kth(scores, available, column, k, DENSE: tl.constexpr):
    """[R] the best column still available, of equals the lowest; ``k`` itself where dense.

    Where nothing compares (NaN), the lowest available column: always an expert's id.
    """
    if DENSE:
        return tl.zeros((scores.shape[0],), tl.int32) + k
    NONE: tl.constexpr = 1 << 30
    top = tl.max(tl.where(available, scores, float("-inf")), 1)
    best = available & (scores == top[:, None])
    found = tl.min(tl.where(best, column, NONE), 1)
    return tl.where(found < NONE, found, tl.min(tl.where(available, column, NONE), 1))


@triton.jit
def _columns(scores, E):
    """The column of each entry of [R, E_BLOCK], and whether it is an expert's."""
    column = tl.zeros(scores.shape, tl.int32) + tl.arange(0, scores.shape[1])[None, :]
    return column, column < E


@triton.jit
def _chosen(scores, E, K: tl.constexpr, DENSE: tl.constexpr):
    """[R, E_BLOCK] whether each row chose the column's expert."""
    column, expert = _columns(scores, E)
    available = expert
    for k in range(K):
        available = available & (column != _kth(scores, available, column, k, DENSE)[:, None])
    return expert & (available == 0)


@triton.jit
def _softmax(scores, mask):
    """Softmax of each row over the columns in ``mask``, 0 elsewhere."""
    top = tl.max(tl.where(mask, scores, float("-inf")), 1)
    weight = tl.where(mask, tl.exp(scores - top[:, None]), 0.0)
    return weight / tl.sum(weight, 1)[:, None]


@triton.jit
def _weights(scores, chosen, E, WEIGHT_MODE: tl.constexpr):
    """[R, E_BLOCK] the weight each expert has if it is chosen."""
    _, expert = _columns(scores, E)
    if WEIGHT_MODE == "renormalize":
        return _softmax(scores, chosen)
    if WEIGHT_MODE == "probability":
        return _softmax(scores, expert)
    return tl.zeros_like(scores) + 1.0  # straight_through, one


@triton.jit
def _scores_grad(scores, spread, chosen, E, WEIGHT_MODE: tl.constexpr):
    """Gradient of the scores from ``spread``, that of the chosen experts' weights."""
    if WEIGHT_MODE == "one":
        return tl.zeros_like(scores)
    _, expert = _columns(scores, E)
    weight = _softmax(scores, chosen if WEIGHT_MODE == "renormalize" else expert)
    if WEIGHT_MODE == "straight_through":  # of log p
        return spread - weight * tl.sum(spread, 1)[:, None]
    return weight * (spread - tl.sum(weight * spread, 1)[:, None])


@triton.jit
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
    """Logits of ROWS tokens; with CHOOSE also their experts, in the same pass over x."""
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
    # A weight that is not finite would give 0 * inf = NaN for padding.
    logits = tl.where(real[:, None], logits, 0.0)
    mask = (token < T)[:, None] & (column < E)[None, :]
    tl.store(logits_ptr + token[:, None] * E + column[None, :], logits, mask=mask)
    if CHOOSE:
        chosen = _chosen(logits, E, K, DENSE)
        weights = _weights(logits, chosen, E, WEIGHT_MODE)
        columns, available = _columns(logits, E)
        for k in range(K):
            best = _kth(logits, available, columns, k, DENSE)
            here = columns == best[:, None]
            available = available & (here == 0)
            weight = tl.where(real, tl.sum(tl.where(here, weights, 0.0), 1), 0.0)
            tl.store(weights_ptr + token * K + k, weight, mask=token < T)
            index = tl.where(real, best, E).to(tl.int64)
            tl.store(index_ptr + token * K + k, index, mask=token < T)
        counts = tl.sum((chosen & real[:, None]).to(tl.int64), 0)
        tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * E + column, counts, mask=column < E)


@triton.jit
def _sentence(starts_ptr, T, B):
    """First and end token of this program's sentence, within [0, T] whatever the starts hold."""
    sentence = tl.program_id(0)
    first = tl.minimum(tl.maximum(tl.load(starts_ptr + sentence), 0), T)
    end = tl.minimum(tl.maximum(tl.load(starts_ptr + sentence + 1), 0), T)
    return first, tl.where(sentence == B - 1, T, end)


@triton.jit
def _real(mask_ptr, token, end, HAS_MASK: tl.constexpr):
    real = token < end
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + token, mask=token < end, other=0) != 0)
    return real


@triton.jit
def _sentence_scores(
    logits_ptr, mask_ptr, first, end, E, HAS_MASK: tl.constexpr, E_BLOCK: tl.constexpr, ROWS
):
    """[1, E_BLOCK] mean logits over the sentence's real tokens, and how many there are."""
    ACC: tl.constexpr = logits_ptr.dtype.element_ty
    column = tl.arange(0, E_BLOCK)
    total = tl.zeros((E_BLOCK,), ACC)
    count = tl.zeros((), tl.int64)
    for start in range(first, end, ROWS):
        token = start + tl.arange(0, ROWS)
        real = _real(mask_ptr, token, end, HAS_MASK)
        logits = logits_ptr + token[:, None] * E + column[None, :]
        mask = real[:, None] & (column < E)[None, :]
        total += tl.sum(tl.load(logits, mask=mask, other=0), 0)
        count += tl.sum(real.to(tl.int64), 0)
    return (total / tl.maximum(count, 1).to(ACC))[None, :], count


@triton.jit
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
    """The experts of one sentence, written to each of its tokens."""
    first, end = _sentence(starts_ptr, T, B)
    scores, count = _sentence_scores(logits_ptr, mask_ptr, first, end, E, HAS_MASK, E_BLOCK, ROWS)
    chosen = _chosen(scores, E, K, DENSE)
    weights = _weights(scores, chosen, E, WEIGHT_MODE)
    columns, available = _columns(scores, E)
    for k in range(K):
        best = _kth(scores, available, columns, k, DENSE)
        here = columns == best[:, None]
        available = available & (here == 0)
        weight = tl.sum(tl.where(here, weights, 0.0), 1)
        for start in range(first, end, ROWS):
            token = start + tl.arange(0, ROWS)
            real = _real(mask_ptr, token, end, HAS_MASK)
            tl.store(weights_ptr + token * K + k, tl.where(real, weight, 0.0), mask=token < end)
            index = tl.where(real, best, E).to(tl.int64)
            tl.store(index_ptr + token * K + k, index, mask=token < end)
    column = tl.arange(0, E_BLOCK)
    counts = tl.sum(chosen.to(tl.int64), 0) * count
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * E + column, counts, mask=column < E)


@triton.jit
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
    """Gradient of the logits of tokens that chose for themselves."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = token[:, None] * E + tl.arange(0, E_BLOCK)[None, :]
    real = _real(mask_ptr, token, T, HAS_MASK)
    mask = real[:, None] & (tl.arange(0, E_BLOCK) < E)[None, :]
    scores = tl.load(logits_ptr + at, mask=mask, other=0)
    columns, available = _columns(scores, E)
    spread = tl.zeros_like(scores)
    for k in range(K):
        here = columns == _kth(scores, available, columns, k, DENSE)[:, None]
        available = available & (here == 0)
        grad = tl.load(grad_weights_ptr + token * K + k, mask=real, other=0)
        spread += tl.where(here, grad[:, None], 0.0)
    grad = _scores_grad(scores, spread, _chosen(scores, E, K, DENSE), E, WEIGHT_MODE)
    grad += tl.load(grad_logits_ptr + at, mask=mask, other=0)
    grad = tl.where(real[:, None], grad, 0.0)
    stored = (token < T)[:, None] & (tl.arange(0, E_BLOCK) < E)[None, :]
    tl.store(out_ptr + at, grad, mask=stored)


@triton.jit
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
    """Gradient of the logits of one sentence's tokens, each of which has 1/count of the mean."""
    first, end = _sentence(starts_ptr, T, B)
    scores, count = _sentence_scores(logits_ptr, mask_ptr, first, end, E, HAS_MASK, E_BLOCK, ROWS)
    columns, available = _columns(scores, E)
    spread = tl.zeros_like(scores)
    for k in range(K):
        here = columns == _kth(scores, available, columns, k, DENSE)[:, None]
        available = available & (here == 0)
        total = tl.zeros((1,), scores.dtype)
        for start in range(first, end, ROWS):
            token = start + tl.arange(0, ROWS)
            real = _real(mask_ptr, token, end, HAS_MASK)
            grads = tl.load(grad_weights_ptr + token * K + k, mask=real, other=0)
            total += tl.sum(grads, 0)
        spread += tl.where(here, total[:, None], 0.0)
    grad = _scores_grad(scores, spread, _chosen(scores, E, K, DENSE), E, WEIGHT_MODE)
    share = grad / tl.maximum(count, 1).to(scores.dtype)
    column = tl.arange(0, E_BLOCK)
    for start in range(first, end, ROWS):
        token = start + tl.arange(0, ROWS)
        real = _real(mask_ptr, token, end, HAS_MASK)
        at = token[:, None] * E + column[None, :]
        own = tl.load(grad_logits_ptr + at, mask=real[:, None] & (column < E)[None, :], other=0)
        value = tl.where(real[:, None], own + share, 0.0)
        tl.store(out_ptr + at, value, mask=(token < end)[:, None] & (column < E)[None, :])


@triton.jit
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


@triton.jit
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
        real = _real(mask_ptr, token, end, HAS_MASK)
        grad = grad_ptr + token[None, :] * E + column[:, None]
        grad = tl.load(grad, mask=real[None, :] & (column < E)[:, None], other=0)
        x = x_ptr + token[:, None] * stride_x + d[None, :]
        x = tl.load(x, mask=real[:, None] & (d < D)[None, :], other=0).to(ACC)
        total = dot(grad, x, total, "ieee")
    out = out_ptr + (tl.program_id(0).to(tl.int64) * E + column)[:, None] * D + d[None, :]
    tl.store(out, total, mask=(column < E)[:, None] & (d < D)[None, :])


def route(
    x: Tensor,
    router_weight: Tensor,
    settings: RouteSettings,
    mask: Tensor | None,
    starts: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [T, K], logits [T, E], ids [T, K] int64 and tokens per expert [E] int64.

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
    blocks = triton.cdiv(num_tokens, _TOKENS)
    programs = blocks
    if settings.sentences:
        assert starts is not None
        programs = starts.shape[0] - 1
    partial = counts.new_empty(programs, num_experts)
    x, router_weight = row_major(x), row_major(router_weight)
    common = dict(**settings.meta(num_experts), HAS_MASK=mask is not None, ROWS=_TOKENS)
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
        DIM=_DIM,
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


def logits_grad(
    grad_weights: Tensor,
    grad_logits: Tensor,
    logits: Tensor,
    settings: RouteSettings,
    mask: Tensor | None,
    starts: Tensor | None,
) -> Tensor:
    """[T, E] the gradient of the logits; 0 for padding. Arguments as in :func:`route_backward`."""
    num_tokens, num_experts = logits.shape
    out = torch.empty_like(logits)
    common = dict(**settings.meta(num_experts), HAS_MASK=mask is not None, ROWS=_TOKENS)
    tensors = (grad_weights.contiguous(), grad_logits.contiguous(), logits, mask)
    if settings.sentences:
        assert starts is not None
        sentences = starts.shape[0] - 1
        sentence_grad_kernel[(sentences,)](
            *tensors, starts, out, num_tokens, sentences, num_experts, **common
        )
    else:
        grid = (triton.cdiv(num_tokens, _TOKENS),)
        token_grad_kernel[grid](*tensors, out, num_tokens, num_experts, **common)
    return out


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
        grad_weights, grad_logits: [T, K] and [T, E], of :func:`route`'s first two results.
        logits: of :func:`route`.
        x, router_weight, settings, mask, starts: as there.
    """
    (num_tokens, dim), num_experts = x.shape, router_weight.shape[0]
    grad_x = x.new_empty(num_tokens, dim)
    grad_weight = router_weight.new_zeros(num_experts, dim)
    if not num_tokens or not dim:
        return grad_x, grad_weight
    grad = logits_grad(grad_weights, grad_logits, logits, settings, mask, starts)
    x, router_weight = row_major(x), row_major(router_weight)
    blocks, columns = triton.cdiv(num_tokens, _TOKENS), triton.cdiv(dim, _DIM)
    tile = dict(
        E_BLOCK=settings.meta(num_experts)["E_BLOCK"],
        ROWS=_TOKENS,
        DIM=_DIM,
    )
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
    run = triton.cdiv(blocks, _MOST_SPLITS) * _TOKENS
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
