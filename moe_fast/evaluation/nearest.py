"""Searches exactly for the documents with the largest dot products, in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def search(
    queries: Any, documents: Any, *, k: int = 10, chunk_size: int = 4096
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """Find the k documents with the largest dot products for each query.

    Of equal scores the document with the lower index comes first. The search is exact, and computes
    ``chunk_size`` x ``chunk_size`` scores at a time. Use normalized vectors for cosines.

    Args:
        queries: [Q, d], an array or a SciPy sparse matrix (TF-IDF).
        documents: [N, d], likewise.
        k: documents per query; all N if there are fewer than k.
        chunk_size: queries, and documents, per block of scores.

    Returns:
        (scores [Q, k], document indices [Q, k] int64), best first.

    Raises:
        ValueError: the shapes do not match, there are no documents, or `k` or `chunk_size` is below
            1.
    """
    _check_search(queries, documents, k, chunk_size)
    starts = range(0, max(queries.shape[0], 1), chunk_size)  # one block even without queries
    blocks = [_search_block(queries[s : s + chunk_size], documents, k, chunk_size) for s in starts]
    scores, indices = zip(*blocks, strict=True)
    return np.concatenate(scores), np.concatenate(indices)


def _check_search(queries: Any, documents: Any, k: int, chunk_size: int) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            "queries [Q, d] and documents [N, d] must be matrices of the same width; got "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    if documents.shape[0] == 0:
        raise ValueError("documents is empty; there is nothing to search")
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k and chunk_size must be at least 1; got k={k}, chunk_size={chunk_size}")


def _search_block(
    queries: Any, documents: Any, k: int, chunk_size: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Search for one chunk of queries: each chunk of documents is merged with the best so far."""
    best: tuple[NDArray[Any], NDArray[np.int64]] | None = None
    for start in range(0, documents.shape[0], chunk_size):
        product = queries @ documents[start : start + chunk_size].T
        scores = product.toarray() if hasattr(product, "toarray") else np.asarray(product)
        indices = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        if best is not None:
            scores = np.concatenate([best[0], scores], axis=1)
            indices = np.concatenate([best[1], indices], axis=1)
        # columns are sorted by index, so a stable sort puts lower indices first among equal scores
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)
    assert best is not None
    return best
