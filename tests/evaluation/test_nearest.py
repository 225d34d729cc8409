from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from moe_fast.evaluation import search


def _vectors(rows: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_search_equals_a_full_sort(chunk_size: int, k: int) -> None:
    queries, documents = _vectors(11, 0), _vectors(23, 1)
    all_scores = queries @ documents.T
    expected = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    scores, hits = search(queries, documents, k=k, chunk_size=chunk_size)
    assert hits.shape == (11, min(k, 23))
    np.testing.assert_array_equal(hits, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(all_scores, expected, 1), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_equal_scores_come_by_index(chunk_size: int) -> None:
    documents = np.ones((5, 2), np.float32)
    documents[3] *= 2
    _, hits = search(np.ones((2, 2), np.float32), documents, k=4, chunk_size=chunk_size)
    assert hits.tolist() == [[3, 0, 1, 2]] * 2


def test_sparse_matrices_give_what_dense_ones_give() -> None:
    queries, documents = _vectors(4, 2), _vectors(9, 3)
    sparse = search(
        scipy.sparse.csr_matrix(queries), scipy.sparse.csr_matrix(documents), k=3, chunk_size=2
    )
    np.testing.assert_array_equal(sparse[1], search(queries, documents, k=3)[1])


def test_no_queries_give_no_hits() -> None:
    scores, hits = search(np.zeros((0, 3)), np.ones((2, 3)), k=5)
    assert scores.shape == hits.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "documents", "options", "message"),
    [
        ((2, 3), (4, 5), {}, r"got \(2, 3\) and \(4, 5\)"),
        ((3,), (4, 3), {}, "must be matrices"),
        ((2, 3), (0, 3), {}, "documents is empty"),
        ((2, 3), (4, 3), {"k": 0}, "k=0"),
        ((2, 3), (4, 3), {"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_search_says_what_is_wrong(queries, documents, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        search(np.ones(queries), np.ones(documents), **options)
