from __future__ import annotations

import ir_measures
import numpy as np
import pytest

from moe_fast.evaluation.ir_metrics import check_measures, query_scores

OURS = ("nDCG@3", "MRR@2", "Recall@5", "MAP@4", "MAP")
THEIRS = ("nDCG@3", "RR@2", "R@5", "AP@4", "AP@1000")


def _data(queries: int = 12, documents: int = 15):
    rng = np.random.default_rng(0)
    qrels = {
        f"q{i}": {f"d{j}": int(rng.integers(-1, 3)) for j in range(0, documents, 2)} | {"d1": 1}
        for i in range(queries)
    }
    run = {
        f"q{i}": {f"d{j}": float(np.round(rng.random(), 1)) for j in rng.permutation(documents)[:9]}
        for i in range(1, queries)
    }
    return run, qrels


def test_the_metrics_are_those_of_ir_measures_called_directly() -> None:
    run, qrels = _data()
    found = query_scores(run, qrels, OURS)
    assert list(found) == list(OURS)
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        measure = ir_measures.parse_measure(theirs)
        by_query = {m.query_id: m.value for m in measure.iter_calc(qrels, run)}
        expected = [by_query.get(query, 0.0) for query in qrels]
        np.testing.assert_array_equal(found[ours], expected)
        assert found[ours][0] == 0  # the run lacks this query


def test_depth() -> None:
    assert check_measures(["nDCG@3", "Recall@20", "MRR@10"]) == 20
    assert check_measures(["nDCG@3", "MAP"]) == 1000


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ([], "at least one"),
        (["MAP", "MAP"], "must be different"),
        (["ndcg@10"], "unknown measure 'ndcg@10'"),
        (["MRR"], "unknown measure 'MRR'"),
    ],
)
def test_unknown_measures(measures: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_measures(measures)
