from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("ir_measures")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import scipy.sparse
import sklearn.metrics

from moe_fast.evaluation import (
    bootstrap_interval,
    mean_scores,
    paired_difference,
    retrieval_scores,
    search,
)


def _vectors(rows: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


# --- search -------------------------------------------------------------------------------------


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


# --- metrics ------------------------------------------------------------------------------------


def _ranked_at(*positions: int, documents: int = 20) -> tuple[np.ndarray, np.ndarray, list]:
    """Queries whose only relevant document stands at the given place (1-based)."""
    # the i-th document scores -i, so that document p - 1 is at place p
    vectors = -np.arange(documents, dtype=np.float32)[:, None]
    return np.ones((len(positions), 1), np.float32), vectors, [{p - 1: 1} for p in positions]


def test_metrics_by_hand() -> None:
    scores = retrieval_scores(*_ranked_at(1, 2, 3, 10, 11))
    np.testing.assert_allclose(
        scores["nDCG@10"], [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11), 0], rtol=1e-6
    )
    np.testing.assert_allclose(scores["MRR@10"], [1, 1 / 2, 1 / 3, 1 / 10, 0], rtol=1e-6)
    np.testing.assert_allclose(scores["Recall@10"], [1, 1, 1, 1, 0])


def test_several_relevant_documents_by_hand() -> None:
    queries, documents, _ = _ranked_at(1)
    scores = retrieval_scores(
        queries, documents, [{0: 1, 3: 1, 15: 1, 1: 0}], measures=["nDCG@5", "Recall@5", "MAP@5"]
    )
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    np.testing.assert_allclose(scores["nDCG@5"], [(1 + 1 / math.log2(5)) / ideal], rtol=1e-6)
    np.testing.assert_allclose(scores["Recall@5"], [2 / 3], rtol=1e-6)
    np.testing.assert_allclose(scores["MAP@5"], [(1 + 2 / 4) / 3], rtol=1e-6)


def test_ndcg_equals_scikit_learns() -> None:
    queries, documents = _vectors(30, 4), _vectors(40, 5)
    grades = np.random.default_rng(6).integers(0, 3, size=(30, 40))
    qrels = [{int(d): int(grade) for d, grade in enumerate(row)} for row in grades]
    found = retrieval_scores(queries, documents, qrels, measures=["nDCG@10"])["nDCG@10"]
    expected = [
        sklearn.metrics.ndcg_score(grades[i : i + 1], (queries @ documents.T)[i : i + 1], k=10)
        for i in range(30)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ties_are_scored_in_the_order_of_search() -> None:
    queries, documents = np.ones((2, 1), np.float32), np.ones((30, 1), np.float32)
    scores = retrieval_scores(queries, documents, [{0: 1}, {12: 1}])
    assert scores["MRR@10"].tolist() == [1.0, 0.0]
    assert scores["nDCG@10"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("qrels", "measures", "message"),
    [
        ([{0: 1}], ["nDCG"], "unknown measure 'nDCG'; allowed are nDCG@k, MRR@k"),
        ([{0: 1}], ["F1@3"], "unknown measure 'F1@3'"),
        ([{0: 1}], ["nDCG@0"], "k >= 1"),
        ([{0: 0}], ["nDCG@3"], r"qrels\[0\] names no relevant document"),
        ([{7: 1}], ["nDCG@3"], "document index 7 is out of range for 5 documents"),
        ([{0: 1}] * 2, ["nDCG@3"], "qrels has 2 entries for 1 queries"),
    ],
)
def test_bad_judgements_and_measures(qrels: list, measures: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_scores(_vectors(1, 0), _vectors(5, 1), qrels, measures=measures)


def test_means_per_domain_and_over_all_queries() -> None:
    scores = {"nDCG@10": np.array([1.0, 0.0, 0.5, 0.5])}
    means = mean_scores(scores, ["b", "a", "b", "b"])
    assert list(means) == ["a", "b", "all"]
    assert means["a"]["nDCG@10"] == 0.0
    assert means["b"]["nDCG@10"] == pytest.approx(2 / 3)
    assert means["all"]["nDCG@10"] == 0.5
    with pytest.raises(ValueError, match="3 domains for 4 values"):
        mean_scores(scores, ["a", "b", "c"])


# --- intervals ----------------------------------------------------------------------------------


def test_bootstrap_is_seeded_and_close_to_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(values, seed=1)
    assert first != bootstrap_interval(values, seed=2)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert first.mean == pytest.approx(values.mean())
    assert first.low == pytest.approx(values.mean() - half_width, abs=0.04)
    assert first.high == pytest.approx(values.mean() + half_width, abs=0.04)


def test_a_constant_has_an_interval_of_no_width() -> None:
    found = bootstrap_interval(np.full(10, 0.25), resamples=50)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    baseline = rng.uniform(size=300)
    system = baseline + 0.02 + rng.normal(0, 0.01, size=300)
    difference = paired_difference(system, baseline)
    assert 0 < difference.low < 0.02 < difference.high + 0.002
    assert difference.high - difference.low < 0.005
    assert bootstrap_interval(system).high - bootstrap_interval(system).low > 0.05
    reverse = paired_difference(baseline, system)
    assert reverse.mean == pytest.approx(-difference.mean)


@pytest.mark.parametrize("values", [[1.0], [[1.0, 2.0]], []])
def test_bootstrap_needs_a_sample(values: list) -> None:
    with pytest.raises(ValueError, match="Q >= 2"):
        bootstrap_interval(values)


def test_paired_difference_needs_pairs() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="confidence"):
        paired_difference([1.0, 2.0], [1.0, 2.0], confidence=95)
