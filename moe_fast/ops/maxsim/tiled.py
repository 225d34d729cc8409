"""maxsim in tiles of the products of some query vectors with the vectors of some documents.

A tile of up to 2048 x 2048 products stays in the processor's cache while its maxima are taken. In
the backward pass each query vector has one winner per document. So its gradient is a weighted sum
of P document vectors, and that of a document vector a weighted sum of the query vectors that it won
for: both are sums over bags of rows, which need no matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import compute_dtype, without_autocast
from moe_fast.ops.cpu_matmul import multiply
from moe_fast.ops.maxsim.reference import factors, implement, owners

# Vectors on either side of a tile, by device; a longer document makes the tile longer.
TILE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Tile:
    """Some query vectors against some documents.

    Attributes:
        rows: (first, last) of the query vectors.
        texts: (first, last) of the documents, all with vectors.
        bounds: where each of these documents begins, and where the last ends, among their vectors.
        columns: (first, last) of the documents' vectors.
    """

    rows: tuple[int, int]
    texts: tuple[int, int]
    bounds: list[int]
    columns: tuple[int, int]


def tiles(num_rows: int, document_starts: Tensor) -> Iterator[Tile]:
    """Yield the tiles that cover all products, documents in the outer loop."""
    size = TILE.get(document_starts.device.type, TILE["cuda"])
    for first, last, starts in _groups(document_starts.tolist(), size):
        width = starts[-1] - starts[0]
        height = max(64, min(size, size * size // width))
        bounds = [start - starts[0] for start in starts]
        for low in range(0, num_rows, height):
            rows = (low, min(low + height, num_rows))
            yield Tile(rows, (first, last), bounds, (starts[0], starts[-1]))


def _groups(starts: list[int], size: int) -> Iterator[tuple[int, int, list[int]]]:
    """Yield neighbouring documents, none empty: (first, last, their starts and the end)."""
    first, own = 0, [starts[0]] if starts else []
    for i, (begin, end) in enumerate(pairwise(starts)):
        full = len(own) > 1 and end - own[0] > size
        if begin == end or full:
            if len(own) > 1:
                yield first, i, own
            first, own = (i + 1, [end]) if begin == end else (i, [begin])
        if begin != end:
            own.append(end)
    if len(own) > 1:
        yield first, len(starts) - 1, own


def _products(tile: Tile, q: Tensor, p: Tensor, space: dict) -> Tensor:
    """Return the tile's products [m, n] in memory that the next tile uses again."""
    x, y = q[slice(*tile.rows)], p[slice(*tile.columns)]
    dtype = compute_dtype(q.dtype)
    shape = (len(x), len(y))
    out = space.get(shape)
    if out is None:
        space.clear()
        space[shape] = out = x.new_empty(shape, dtype=dtype)
    return multiply(x.to(dtype), y.to(dtype).t(), out=out)


def forward(
    queries: Tensor, documents: Tensor, query_starts: Tensor, document_starts: Tensor, mean: bool
) -> Tensor:
    """Return the scores [Q, P]."""
    dtype = compute_dtype(queries.dtype)
    num_queries, num_documents = len(query_starts) - 1, len(document_starts) - 1
    scores = queries.new_zeros((num_queries, num_documents), dtype=dtype)
    of_query = owners(query_starts, len(queries))
    space: dict = {}
    for tile in tiles(len(queries), document_starts):
        s = _products(tile, queries, documents, space)
        largest = torch.stack([s[:, a:b].amax(1) for a, b in pairwise(tile.bounds)], dim=1)
        of_rows = of_query[slice(*tile.rows)]
        scores[:, slice(*tile.texts)].index_add_(0, of_rows, largest)
    return scores.mul_(factors(query_starts, mean, dtype)[:, None])


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
    weights = grad.to(dtype) * factors(query_starts, mean, dtype)[:, None]
    of_query = owners(query_starts, len(queries))
    grad_q = torch.zeros_like(queries, dtype=dtype, memory_format=torch.contiguous_format)
    grad_p = torch.zeros_like(documents, dtype=dtype, memory_format=torch.contiguous_format)
    space: dict = {}
    for tile in tiles(len(queries), document_starts):
        s = _products(tile, queries, documents, space)
        best = torch.stack([s[:, a:b].argmax(1) + a for a, b in pairwise(tile.bounds)], dim=1)
        here = weights[:, slice(*tile.texts)][of_query[slice(*tile.rows)]]
        rows, columns = slice(*tile.rows), slice(*tile.columns)
        _add_winners(grad_q[rows], documents[columns].to(dtype), best, here)
        _add_won(grad_p[columns], queries[rows].to(dtype), best, here)
    return grad_q.to(queries.dtype), grad_p.to(documents.dtype)


def _add_winners(grad_q: Tensor, p: Tensor, best: Tensor, weights: Tensor) -> None:
    """Add to each query vector's gradient [m, d] its winners p[best], best [m, k], weighted."""
    grad_q += F.embedding_bag(best, p, per_sample_weights=weights, mode="sum")


def _add_won(grad_p: Tensor, q: Tensor, best: Tensor, weights: Tensor) -> None:
    """Add to each document vector's gradient [n, d] the query vectors it won for, weighted."""
    winner, order = best.flatten().to(torch.int32).sort(stable=True)  # in a fixed order of sums
    bags = torch.arange(len(grad_p), dtype=torch.int32, device=best.device)
    grad_p += F.embedding_bag(
        order // best.shape[1],
        q,
        torch.searchsorted(winner, bags),
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    )


backends.register(
    "maxsim",
    "tiled",
    implement("tiled", without_autocast(forward), without_autocast(gradients)),
)
