"""maxsim on a GPU, some documents at a time, by the kernels of ``triton_ops/maxsim.py``.

The largest products of all query vectors with these documents, or their winners, take up to 2^25
entries; the number of documents at a time follows from shapes alone, so that nothing waits for the
GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.checks import compute_dtype, without_autocast
from moe_fast.ops.maxsim.reference import factors, implement, owners

MOST_ENTRIES = 2**25


def _spans(num_vectors: int, num_documents: int) -> Iterator[tuple[int, int]]:
    size = max(1, MOST_ENTRIES // max(num_vectors, 1))
    for first in range(0, num_documents, size):
        yield first, min(first + size, num_documents)


def forward(
    queries: Tensor, documents: Tensor, query_starts: Tensor, document_starts: Tensor, mean: bool
) -> Tensor:
    """Return the scores [Q, P]."""
    from moe_fast.triton_ops.launch import row_major
    from moe_fast.triton_ops.maxsim import best_of, sum_of

    dtype = compute_dtype(queries.dtype)
    q, p = row_major(queries), row_major(documents)
    starts = query_starts.to(torch.int64), document_starts.to(torch.int64)
    scores = q.new_empty((len(query_starts) - 1, len(document_starts) - 1), dtype=dtype)
    shares = factors(query_starts, mean, dtype)
    for first, last in _spans(len(q), scores.shape[1]):
        best = best_of(q, p, starts[1], first, last - first, winners=False)
        sum_of(best, starts[0], shares, scores[:, first:last])
    return scores


def gradients(
    grad: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_starts: Tensor,
    document_starts: Tensor,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries' and the documents' vectors."""
    from moe_fast.triton_ops.launch import row_major
    from moe_fast.triton_ops.maxsim import (
        add_query_gradients,
        best_of,
        write_document_gradients,
    )

    dtype = compute_dtype(queries.dtype)
    q, p = row_major(queries), row_major(documents)
    weights = grad.to(dtype) * factors(query_starts, mean, dtype)[:, None]
    of_query, starts = owners(query_starts, len(q)), document_starts.to(torch.int64)
    grad_q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    grad_p = torch.zeros_like(p, memory_format=torch.contiguous_format)
    for first, last in _spans(len(q), grad.shape[1]):
        winners = best_of(q, p, starts, first, last - first, winners=True)
        here = (winners, weights[:, first:last], of_query, starts[first : last + 1])
        add_query_gradients(grad_q, p, *here)
        write_document_gradients(grad_p, q, *here)
    return grad_q.to(queries.dtype), grad_p


_run = implement(
    "triton",
    triton_backend.on_device(without_autocast(forward)),
    triton_backend.on_device(without_autocast(gradients)),
)
triton_backend.offer("maxsim", _run)
