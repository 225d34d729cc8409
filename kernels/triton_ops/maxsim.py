"""MaxSim: the largest product of each query vector with the vectors of each document.

    best[i, t]     max over the vectors j of document t of <q_i, p_j>, or the j that attains it
    scores         the sum of best over the vectors of a query
    grad_q[i]      sum over t of w[i, t] p[winner[i, t]]
    grad_p[j]      sum over the i that j won of w[i, t] q_i

A program of the first kernel holds some query vectors and runs through the vectors of one document,
so that products stay in registers. Sums have a fixed order and there are no atomics: every run
gives the same bits. The gradient of a document vector multiplies a one-hot matrix of winners, which
is made in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch_config
from .config import Config
from .launch import accumulator, precision, triton_dtype
from .numerics import cast, dot

# Columns of the gradients that a program sums, and query vectors that it takes at once.
_GRAD_COLUMNS, _GRAD_ROWS = 64, 32


def config_of(x: Tensor) -> Config:
    """Tile sizes for vectors [n, d]."""
    if launch_config.target_of(x.device.index) == "interpreter":
        return Config(16, 16, 16, 4, 1)
    if x.dtype.itemsize == 2:
        return Config(128, 64, 64, 4, 3)
    return Config(64, 64, 32, 4, 3)


@triton.jit(do_not_specialize=["M", "first_document", "num_documents"])
def maxsim_best_kernel(
    q_ptr,  # [M, D]
    p_ptr,  # [N, D]
    starts_ptr,  # [P + 1], vectors of documents
    best_ptr,  # [M, documents] float, or int64 winners
    M,
    D,
    first_document,
    num_documents,
    stride_q,
    stride_p,
    WINNERS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """BM query vectors against one document, which may have no vectors."""
    document = tl.program_id(1)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.load(starts_ptr + first_document + document)
    last = tl.load(starts_ptr + first_document + document + 1)
    best = tl.full((BM,), float("-inf"), ACC)
    winner = tl.zeros((BM,), tl.int64) + first
    d = tl.arange(0, BK)
    for start in range(first, last, BN):
        col = start + tl.arange(0, BN).to(tl.int64)
        q = q_ptr + row.to(tl.int64)[:, None] * stride_q + d[None, :]
        p = p_ptr + col[None, :] * stride_p + d[:, None]
        s = tl.zeros((BM, BN), ACC)
        for k in range(0, D, BK):
            q_mask, p_mask = (row < M)[:, None], (col < last)[None, :]
            if not EVEN_D:
                q_mask = q_mask & (d < D - k)[None, :]
                p_mask = p_mask & (d < D - k)[:, None]
            s = dot(
                tl.load(q, mask=q_mask, other=0), tl.load(p, mask=p_mask, other=0), s, PRECISION
            )
            q += BK
            p += BK
        s = tl.where((col < last)[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        if WINNERS:
            place = tl.min(tl.where(s == top[:, None], col[None, :], last), 1)
            winner = tl.where((top > best) & (place < last), place, winner)
        # NaN is the largest, as for torch.amax.
        broken = (tl.max((s != s).to(tl.int32), 1) > 0) | (best != best)
        best = tl.where(broken, float("nan"), tl.where(top > best, top, best))
    at = best_ptr + row.to(tl.int64) * num_documents + document
    if WINNERS:
        tl.store(at, winner, mask=row < M)
    else:
        tl.store(at, tl.where(last > first, best, 0.0), mask=row < M)


@triton.jit(do_not_specialize=["num_documents", "stride_out"])
def maxsim_sum_kernel(
    best_ptr,  # [M, documents]
    starts_ptr,  # [Q + 1], vectors of queries
    factor_ptr,  # [Q]
    out_ptr,  # [Q, stride_out]
    num_documents,
    stride_out,
    COLUMNS: tl.constexpr,
):
    """The scores of one query against COLUMNS documents."""
    query = tl.program_id(0)
    document = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts_ptr + query)
    last = tl.load(starts_ptr + query + 1)
    total = tl.zeros((COLUMNS,), best_ptr.dtype.element_ty)
    for row in range(first, last):
        at = best_ptr + tl.cast(row, tl.int64) * num_documents + document
        total += tl.load(at, mask=document < num_documents, other=0)
    total *= tl.load(factor_ptr + query)
    out = out_ptr + tl.cast(query, tl.int64) * stride_out + document
    tl.store(out, total, mask=document < num_documents)


@triton.jit(do_not_specialize=["M", "num_documents", "stride_w"])
def maxsim_grad_query_kernel(
    p_ptr,  # [N, D]
    winner_ptr,  # [M, documents]
    weight_ptr,  # [Q, stride_w], at the first document
    owner_ptr,  # [M], the query of each vector
    starts_ptr,  # [P + 1], at the first document
    grad_ptr,  # [M, D], added to
    M,
    D,
    num_documents,
    stride_p,
    stride_w,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the weighted winners of ROWS query vectors to COLUMNS columns of their gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid, inside = row < M, d < D
    owner = tl.load(owner_ptr + row, mask=valid, other=0)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for document in range(0, num_documents):
        has_vectors = tl.load(starts_ptr + document) < tl.load(starts_ptr + document + 1)
        used = valid & has_vectors
        winner = tl.load(winner_ptr + row * num_documents + document, mask=used, other=0)
        weight = tl.load(weight_ptr + owner * stride_w + document, mask=used, other=0)
        p = p_ptr + winner[:, None] * stride_p + d[None, :]
        vectors = tl.load(p, mask=used[:, None] & inside[None, :], other=0).to(ACC)
        total += weight.to(ACC)[:, None] * vectors
    at = grad_ptr + row[:, None] * D + d[None, :]
    mask = valid[:, None] & inside[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0) + total, mask=mask)


@triton.jit(do_not_specialize=["M", "num_documents", "stride_w"])
def maxsim_grad_document_kernel(
    q_ptr,  # [M, D]
    winner_ptr,  # [M, documents]
    weight_ptr,  # [Q, stride_w], at the first document
    owner_ptr,  # [M]
    starts_ptr,  # [P + 1], at the first document
    grad_ptr,  # [N, D] in the vectors' dtype
    M,
    D,
    num_documents,
    stride_q,
    stride_w,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS columns of the gradient of one document's vectors."""
    document = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < D
    first = tl.load(starts_ptr + document)
    last = tl.load(starts_ptr + document + 1)
    for start in range(first, last, BN):
        col = start + tl.arange(0, BN).to(tl.int64)
        total = tl.zeros((BN, COLUMNS), ACC)
        for begin in range(0, M, BM):
            row = begin + tl.arange(0, BM).to(tl.int64)
            valid = row < M
            winner = tl.load(winner_ptr + row * num_documents + document, mask=valid, other=-1)
            owner = tl.load(owner_ptr + row, mask=valid, other=0)
            weight = tl.load(weight_ptr + owner * stride_w + document, mask=valid, other=0)
            won = tl.where(col[:, None] == winner[None, :], weight.to(ACC)[None, :], 0.0)
            q = q_ptr + row[:, None] * stride_q + d[None, :]
            vectors = tl.load(q, mask=valid[:, None] & inside[None, :], other=0)
            total = dot(won, vectors.to(ACC), total, PRECISION)
        mask = (col < last)[:, None] & inside[None, :]
        at = grad_ptr + col[:, None] * D + d[None, :]
        tl.store(at, cast(total, DTYPE), mask=mask)


def best_of(
    q: Tensor,
    p: Tensor,
    document_starts: Tensor,
    first: int,
    count: int,
    *,
    winners: bool,
    config: Config | None = None,
) -> Tensor:
    """The largest products of [M] query vectors with ``count`` documents, or who attains them.

    Args:
        q, p: [M, D] and [N, D], rows contiguous, one dtype.
        document_starts: [P + 1] int64.
        first, count: the documents.
        winners: return indices into p instead; for a document without vectors, undefined.
        config: tile sizes; ``None``: the usual ones.

    Returns:
        [M, count] in the accumulator's dtype (0 for a document without vectors), or int64.
    """
    acc, config = accumulator(q.dtype), config or config_of(q)
    out = q.new_empty((len(q), count), dtype=torch.int64 if winners else acc)
    if not out.numel():
        return out
    maxsim_best_kernel[(triton.cdiv(len(q), config.block_m), count)](
        q,
        p,
        document_starts,
        out,
        len(q),
        q.shape[1],
        first,
        count,
        q.stride(0),
        p.stride(0),
        WINNERS=winners,
        EVEN_D=q.shape[1] % config.block_k == 0,
        PRECISION=precision(q.dtype),
        ACC=triton_dtype(acc),
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def sum_of(best: Tensor, query_starts: Tensor, factors: Tensor, out: Tensor) -> None:
    """Write each query's sum of ``best`` [M, documents], times its factor [Q], to [Q, documents].

    ``out`` may be some columns of a larger tensor.
    """
    if not out.numel():
        return
    columns = 64
    maxsim_sum_kernel[(out.shape[0], triton.cdiv(out.shape[1], columns))](
        best, query_starts, factors, out, out.shape[1], out.stride(0), COLUMNS=columns
    )


def add_query_gradients(
    grad: Tensor, p: Tensor, winners: Tensor, weights: Tensor, owners: Tensor, starts: Tensor
) -> None:
    """Add to ``grad`` [M, D] the weighted winners among p [N, D] of some documents.

    Args:
        winners: [M, documents] int64.
        weights: [Q, documents], maybe some columns of a larger tensor.
        owners: [M] int64, the query of each vector.
        starts: [documents + 1] int64, into p.
    """
    if not winners.numel() or not grad.numel():
        return
    grid = (triton.cdiv(len(grad), _GRAD_ROWS), triton.cdiv(grad.shape[1], _GRAD_COLUMNS))
    maxsim_grad_query_kernel[grid](
        p,
        winners,
        weights,
        owners,
        starts,
        grad,
        len(grad),
        grad.shape[1],
        winners.shape[1],
        p.stride(0),
        weights.stride(0),
        ACC=triton_dtype(grad.dtype),
        ROWS=_GRAD_ROWS,
        COLUMNS=_GRAD_COLUMNS,
    )


def write_document_gradients(
    grad: Tensor, q: Tensor, winners: Tensor, weights: Tensor, owners: Tensor, starts: Tensor
) -> None:
    """Write the gradients of some documents' vectors into ``grad`` [N, D]; arguments as above.

    A one-hot matrix in float32 is multiplied as TF32 if the vectors have 16 bits.
    """
    if not winners.shape[1] or not grad.numel():
        return
    acc = accumulator(q.dtype)
    grid = (winners.shape[1], triton.cdiv(grad.shape[1], _GRAD_COLUMNS))
    maxsim_grad_document_kernel[grid](
        q,
        winners,
        weights,
        owners,
        starts,
        grad,
        len(q),
        grad.shape[1],
        winners.shape[1],
        q.stride(0),
        weights.stride(0),
        DTYPE=triton_dtype(grad.dtype),
        PRECISION="tf32" if q.dtype.itemsize == 2 else precision(q.dtype),
        ACC=triton_dtype(acc),
        BM=_GRAD_ROWS,
        BN=32,
        COLUMNS=_GRAD_COLUMNS,
    )
