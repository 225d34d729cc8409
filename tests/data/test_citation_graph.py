"""Against plain loops over papers."""

from __future__ import annotations

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs the extra moe-fast[train]")
from scipy.sparse import csr_array

from moe_fast.data.citation_graph import cocited, unlinked, without_surveys

N = 9


@st.composite
def _graphs(draw: st.DrawFn) -> np.ndarray:
    """[N, N] int32: anything from no citation to every paper citing every other."""
    dense = draw(st.sampled_from([0.1, 0.3, 0.9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    graph = (rng.random((N, N)) < dense).astype(np.int32)
    np.fill_diagonal(graph, 0)
    return graph


def _together(graph: np.ndarray, i: int, j: int) -> int:
    return sum(1 for citer in range(N) if graph[citer, i] and graph[citer, j])


def _linked(graph: np.ndarray, i: int, j: int) -> bool:
    return bool(graph[i, j] or graph[j, i] or _together(graph, i, j))


# One product per block, a few, all: the blocks must not show in the result.
BLOCKS = st.sampled_from([1, 7, 10**6])


@given(_graphs(), st.integers(1, 4), BLOCKS)
def test_cocited(graph: np.ndarray, least: int, block: int):
    expected = [p for p in combinations(range(N), 2) if _together(graph, *p) >= least]
    with patch("moe_fast.data.citation_graph.BLOCK_PRODUCTS", block):
        pairs = cocited(csr_array(graph), least)
    assert pairs.dtype == np.int64
    assert list(map(tuple, pairs.T.tolist())) == expected


@given(
    _graphs(),
    st.lists(st.integers(0, 5), min_size=N, max_size=N),
    st.lists(st.integers(0, 2), min_size=N, max_size=N),
    st.integers(0, 99),
    BLOCKS,
)
def test_unlinked(graph: np.ndarray, wanted: list[int], pools: list[int], seed: int, block: int):
    with patch("moe_fast.data.citation_graph.BLOCK_PRODUCTS", block):
        pairs = unlinked(
            csr_array(graph), np.array(wanted), np.array(pools), np.random.default_rng(seed)
        )
    drawn = list(map(tuple, pairs.T.tolist()))
    assert len({frozenset(pair) for pair in drawn}) == len(drawn)
    assert all(i != j and pools[i] == pools[j] and not _linked(graph, i, j) for i, j in drawn)
    for paper in range(N):
        partners = [j for i, j in drawn if i == paper]
        assert len(partners) <= wanted[paper]
        if len(partners) < wanted[paper]:  # then every possible partner is in some pair with it
            allowed = {
                other
                for other in range(N)
                if other != paper and pools[other] == pools[paper]
                if not _linked(graph, paper, other)
            }
            assert allowed == {sum(pair) - paper for pair in drawn if paper in pair}


def test_unlinked_draws_uniformly():
    graph = csr_array((N, N), dtype=np.int32)
    wanted, pools = np.array([2] + [0] * (N - 1)), np.zeros(N, dtype=np.int64)
    rng = np.random.default_rng(0)
    counts = sum(
        np.bincount(unlinked(graph, wanted, pools, rng)[1], minlength=N) for _ in range(800)
    )
    # 1,600 draws over 8 partners: 200 each, with a standard deviation of 12
    assert counts[0] == 0 and np.abs(counts[1:] - 200).max() < 60


@given(_graphs(), st.integers(2, N))
def test_without_surveys(graph: np.ndarray, most: int):
    before = csr_array(graph)
    kept, passed_over = without_surveys(before, most)
    surveys = graph.sum(1) > most
    assert passed_over == surveys.sum()
    assert kept.nnz == graph[~surveys].sum()
    assert (kept.toarray() == np.where(surveys[:, None], 0, graph)).all()
    assert (before.toarray() == graph).all()
