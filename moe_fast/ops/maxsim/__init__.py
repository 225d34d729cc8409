"""maxsim: the late-interaction score of every query against every document (ColBERT's MaxSim).

With the vectors q_i [d] of a query, i = 1 .. n, and p_j [d] of a document, j = 1 .. m:

    score = sum over i of max over j of <q_i, p_j>          mean: divided by n
    score = 0 if the query or the document has no vectors

Vectors are packed one after the other without padding; ``starts`` say where each text's begin. With
j* = argmax_j <q_i, p_j> and the gradient g of the score (divided by n for the mean):

    dq_i += g p_j*      dp_j* += g q_i

Of equal products, one gets the gradient. The B x B x L x L products are computed in tiles, and none
is kept: the backward pass computes them again, which needs as many products as the forward pass
and, since each query vector has one j* per document, no others. Products, maxima and sums have at
least float32, whatever the inputs are.

Source: Khattab and Zaharia, arXiv 2004.12832; the mean: Chen et al., arXiv 2402.03216.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_dtype,
    check_like,
    check_shape,
    checks_values,
    compute_dtype,
    wants_gradients,
)
from moe_fast.ops.maxsim import reference, tiled, triton  # noqa: F401 - each registers itself


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_starts: Tensor,
    document_starts: Tensor,
    *,
    mean: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Compute the MaxSim score of every query against every document; see the module's docstring.

    Args:
        queries: [Tq, d], the vectors of Q queries; usually of length 1.
        documents: [Tp, d], the vectors of P documents.
        query_starts, document_starts: [Q + 1] and [P + 1] int32 or int64; the first is 0, the last
            the number of vectors. A text may have none.
        mean: divide by the number of the query's vectors, as BGE-M3 does, so that the score of unit
            vectors is at most 1. False: the sum, as in ColBERT.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [Q, P] float32 (float64 for float64 inputs). Gradients reach both kinds of vectors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or (if values are checked)
            starts do not rise from 0 to the number of vectors.
    """
    run = _prepare(queries, documents, query_starts, document_starts, backend)
    for name, starts, vectors in (
        ("query_starts", query_starts, queries),
        ("document_starts", document_starts, documents),
    ):
        _check_starts(name, starts, len(vectors))
    return run(queries, documents, query_starts, document_starts, mean)


@once_per_signature
def _prepare(
    queries: Tensor,
    documents: Tensor,
    query_starts: Tensor,
    document_starts: Tensor,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("queries", queries, (None, None), "[Tq, d]")
    check_dtype("queries", queries, FLOAT_DTYPES)
    check_shape("documents", documents, (None, queries.shape[1]), "[Tp, d]")
    if documents.dtype != queries.dtype:
        raise TypeError(
            f"documents must have the dtype of queries, {queries.dtype}; got {documents.dtype}."
        )
    for name, starts in (("query_starts", query_starts), ("document_starts", document_starts)):
        check_shape(name, starts, (None,), "[N + 1]")
        check_dtype(name, starts, INTEGER_DTYPES)
        if not len(starts):
            raise ValueError(f"{name} must hold at least one entry, 0; got none.")
    check_like(
        "queries",
        queries,
        dtype=False,
        documents=documents,
        query_starts=query_starts,
        document_starts=document_starts,
    )
    dtype = compute_dtype(queries.dtype)
    needs_grad = wants_gradients(queries, documents)
    return backends.select("maxsim", backend, queries.device, dtype, gradients=needs_grad)


def maxsim_gradients(
    grad: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_starts: Tensor,
    document_starts: Tensor,
    *,
    mean: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of ``queries`` and ``documents``, without a graph.

    For callers that compute the scores of parts of a batch and hold only the parts' vectors.

    Args:
        grad: [Q, P], the gradient of the scores.
        queries, documents, query_starts, document_starts, mean, backend: as in :func:`maxsim`.
    """
    run = _prepare(queries, documents, query_starts, document_starts, backend)
    return reference.GRADIENTS[run](grad, queries, documents, query_starts, document_starts, mean)


def _check_starts(name: str, starts: Tensor, count: int) -> None:
    if torch.compiler.is_compiling() or not checks_values(starts.device):
        return
    rises = bool((starts.diff() >= 0).all())
    if int(starts[0]) != 0 or int(starts[-1]) != count or not rises:
        raise ValueError(f"{name} must rise from 0 to {count}; got {starts.tolist()}.")
