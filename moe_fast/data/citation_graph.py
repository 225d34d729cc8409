"""Finds pairs of papers that are cited together, and pairs that have no link.

In this module ``citations`` is a sparse integer matrix [N, N] that is 1 where the row's paper cites
the column's paper; its diagonal is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BLOCK_PRODUCTS = 10_000_000  # products per block of the co-citation matrix, about 16 bytes each
Ints = NDArray[np.int64]


def cocited(citations: csr_array, min_cocitations: int) -> Ints:
    """Find the pairs of papers that are cited together by at least `min_cocitations` papers.

    Blocks of rows of citations^T citations are computed one at a time, so that memory holds the
    result and one block (or one row, if that is larger).

    Args:
        citations: [N, N], 1 where the row's paper cites the column's; no self-citations.
        min_cocitations: the number of papers that must cite both.

    Returns:
        [2, P] int64: each pair once, the paper with the lower number first, sorted.
    """
    from scipy.sparse import csr_array

    citers = csr_array(citations.T)
    found = [np.empty((2, 0), dtype=np.int64)]
    for start, stop in _blocks(citers, citations):
        counts = (citers[start:stop] @ citations).tocoo()
        first, second = counts.coords[0].astype(np.int64) + start, counts.coords[1]
        chosen = (first < second) & (counts.data >= min_cocitations)
        block = np.stack([first[chosen], second[chosen].astype(np.int64)])
        found.append(block[:, np.lexsort(block[::-1])])
    return np.concatenate(found, axis=1)


def unlinked(citations: csr_array, wanted: Ints, pools: Ints, rng: np.random.Generator) -> Ints:
    """Draw pairs of papers of the same pool that have no link; no pair is drawn twice.

    Two papers have no link if neither cites the other and no paper cites both. The partner of a
    paper is drawn uniformly from those that are allowed.

    Args:
        citations: [N, N], as for `cocited`.
        wanted: [N], the number of pairs to draw for each paper, as their first paper.
        pools: [N] integers from 0, the pool of each paper.
        rng: the generator that draws the partners.

    Returns:
        [2, M] int64: the pairs sorted by their first paper. A paper has fewer pairs than wanted
        only if no further partner is left.
    """
    from scipy.sparse import csr_array

    citers = csr_array(citations.T)
    members = [np.flatnonzero(pools == pool) for pool in range(pools.max() + 1)]
    taken: set[tuple[int, int]] = set()
    pairs: list[tuple[int, int]] = []
    for start, stop in _blocks(citers, citations):
        if not wanted[start:stop].any():
            continue
        rows = slice(start, stop)
        links = csr_array(citers[rows] @ citations + citations[rows] + citers[rows])
        for paper in start + np.flatnonzero(wanted[rows]):
            row = slice(links.indptr[paper - start], links.indptr[paper - start + 1])
            linked = np.append(links.indices[row], paper)
            partners = _draw(int(paper), wanted[paper], members[pools[paper]], linked, taken, rng)
            pairs.extend((int(paper), partner) for partner in partners)
    return np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T


def _draw(
    paper: int,
    wanted: int,
    pool: Ints,
    linked: Ints,
    taken: set[tuple[int, int]],
    rng: np.random.Generator,
) -> list[int]:
    """Draw up to `wanted` partners of a paper that are not linked to it, and add them to `taken`.

    Pairs that are in `taken` already are not drawn again.
    """
    # to draw a few more than wanted is nearly always enough, and cheaper than to shuffle the pool
    for size in (min(len(pool), 2 * wanted + 16), len(pool)):
        drawn = rng.choice(pool, size, replace=False)
        free = drawn[~np.isin(drawn, linked)].tolist()
        pairs = [(min(paper, partner), max(paper, partner)) for partner in free]
        fresh = [i for i, pair in enumerate(pairs) if pair not in taken][:wanted]
        if len(fresh) == wanted or size == len(pool):
            break
    taken.update(pairs[i] for i in fresh)
    return [free[i] for i in fresh]


def _blocks(citers: csr_array, citations: csr_array) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of ``citers @ citations`` with about `BLOCK_PRODUCTS` products each."""
    references = np.diff(citations.indptr).astype(np.int64)
    products = np.cumsum(citers @ references)
    start = 0
    while start < len(products):
        done = products[start - 1] if start else 0
        stop = int(np.searchsorted(products, done + BLOCK_PRODUCTS, side="right"))
        stop = max(stop, start + 1)
        yield start, stop
        start = stop


def without_surveys(citations: csr_array, max_references: int) -> tuple[csr_array, int]:
    """Remove the citations made by papers with more than `max_references` references.

    Returns:
        The remaining citations, and the number of papers whose citations were removed.
    """
    references = np.diff(citations.indptr)
    counted = references <= max_references
    kept = citations.copy()
    kept.data *= np.repeat(counted, references)
    kept.eliminate_zeros()
    return kept, int((~counted).sum())
