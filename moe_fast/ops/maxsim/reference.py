"""maxsim in plain PyTorch: one document after the other, the definition in a few lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import compute_dtype, without_autocast
from moe_fast.ops.eager_dispatch import Operation


def owners(starts: Tensor, count: int) -> Tensor:
    """Return the text of each of ``count`` vectors, [count] int64."""
    texts = torch.arange(len(starts) - 1, device=starts.device)
    return texts.repeat_interleave(starts.to(torch.int64).diff(), output_size=count)


def factors(starts: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    """Return by what a text's sum is multiplied, [N]: 1, or 1 / the number of its vectors."""
    lengths = starts.diff().to(dtype)
    return 1 / lengths.clamp(min=1) if mean else torch.ones_like(lengths)


def forward(
    queries: Tensor, documents: Tensor, query_starts: Tensor, document_starts: Tensor, mean: bool
) -> Tensor:
    """Return the scores [Q, P]."""
    dtype = compute_dtype(queries.dtype)
    q, p = queries.to(dtype), documents.to(dtype)
    scores = q.new_zeros((len(query_starts) - 1, len(document_starts) - 1))
    of_query = owners(query_starts, len(q))
    starts = document_starts.tolist()
    for i, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        if last > first:
            largest = (q @ p[first:last].t()).amax(1)
            scores[:, i] = scores[:, i].index_add(0, of_query, largest)
    return scores * factors(query_starts, mean, dtype)[:, None]


def gradients(
    grad: Tensor,
    queries: Tensor,
    documents: Tensor,
    query_starts: Tensor,
    document_starts: Tensor,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the queries' and the documents' vectors."""
    dtype = compute_dtype(queries.dtype)
    q, p = queries.to(dtype), documents.to(dtype)
    grad_q, grad_p = torch.zeros_like(q), torch.zeros_like(p)
    weights = (grad.to(dtype) * factors(query_starts, mean, dtype)[:, None])[
        owners(query_starts, len(q))
    ]
    starts = document_starts.tolist()
    for i, (first, last) in enumerate(zip(starts, starts[1:], strict=False)):
        if last > first:
            best = first + (q @ p[first:last].t()).argmax(1)
            grad_q += weights[:, i, None] * p[best]
            grad_p.index_add_(0, best, weights[:, i, None] * q)
    return grad_q.to(queries.dtype), grad_p.to(documents.dtype)


def fake(
    queries: Tensor, documents: Tensor, query_starts: Tensor, document_starts: Tensor, mean: bool
) -> Tensor:
    """Return an empty tensor of the scores' shape."""
    shape = (len(query_starts) - 1, len(document_starts) - 1)
    return queries.new_empty(shape, dtype=compute_dtype(queries.dtype))


def fake_gradients(grad: Tensor, queries: Tensor, documents: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the gradients' shapes."""
    return (
        torch.empty_like(queries, memory_format=torch.contiguous_format),
        torch.empty_like(documents, memory_format=torch.contiguous_format),
    )


OPERATION = Operation(forward, fake, fake_gradients, differentiable=2)
# By implementation, what computes its gradients.
GRADIENTS: dict[Callable, Callable] = {}


def implement(backend: str, forward: Callable, gradients: Callable) -> Callable:
    """Register an implementation of the op and its gradients; return the function to call."""
    run = OPERATION.implement(f"maxsim_{backend}", forward, gradients)
    GRADIENTS[run] = gradients
    return run


backends.register(
    "maxsim",
    "torch",
    implement("torch", without_autocast(forward), without_autocast(gradients)),
)
