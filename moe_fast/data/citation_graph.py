"""Finds papers that are cited together in a citation graph, and papers without a link.

Throughout, ``citations`` is [N, N], sparse and of integers: 1 where the row's paper cites the
column's, with an empty diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BLOCK_PRODUCTS = 10_000_000  # of one block of the co-citation matrix, some 16 bytes each
Ints = NDArray[np.int64]


def cocited(citations: csr_array, min_cocitations: int) -> Ints:
    """[2, P] int64: the pairs of papers, the lower number first, that are cited together.

    Args:
        citations: [N, N], 1 where the row's paper cites the column's; no self-citations.
        min_cocitations: by at least so many papers.

    Returns:
        Each pair once, sorted. Column blocks of citations^T citations are made one at a time, so
        that memory is bounded by the result and one block (or one row, where that is larger).
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
    """[2, M] int64: pairs of papers of one pool with no link, no pair twice.

    No link: neither cites the other, and no paper cites both.

    Args:
        citations: [N, N], as for `cocited`.
        wanted: [N], how many pairs each paper should be the first of.
        pools: [N], the pool of each paper.
        rng: of the draws, uniform over what is allowed.

    Returns:
        The pairs sorted by their first paper; fewer than wanted only where no partner is left.
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
    """Up to `wanted` of the pool that are neither linked nor taken, which is then noted."""
    # a few more than wanted are nearly always enough, and cheaper than to shuffle the pool
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
    """Ranges of rows of ``citers @ citations`` of about `BLOCK_PRODUCTS` products each."""
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
    """Removes the citations of papers with too many references, and counts these papers."""
    references = np.diff(citations.indptr)
    counted = references <= max_references
    kept = citations.copy()
    kept.data *= np.repeat(counted, references)
    kept.eliminate_zeros()
    return kept, int((~counted).sum())
