from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.evaluation import threshold_counts as ladders
from moe_fast.evaluation.threshold_counts import (
    Resampled,
    best_accuracy_threshold,
    best_f1,
    counts_at,
    f1_of,
    labelled_ladder,
    off_diagonal_ladder,
    ranking_metrics,
)

# few different values, so that ties are the rule
PAIRS = st.lists(
    st.tuples(st.integers(-3, 3).map(lambda i: i / 4), st.booleans()), min_size=2, max_size=30
).filter(lambda pairs: len({label for _, label in pairs}) == 2)


def _by_scikit_learn(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    above = scores >= np.unique(scores)[:, None]  # [thresholds, pairs]
    f1 = 2 * (above & labels).sum(1) / (above.sum(1) + labels.sum())
    return {
        "ROC-AUC": sklearn.metrics.roc_auc_score(labels, scores),
        "AP": sklearn.metrics.average_precision_score(labels, scores),
        "F1max": f1.max(),
    }


def _found(totals) -> dict[str, float]:
    return ranking_metrics(totals) | {"F1max": best_f1(totals)[0]}


def _resampled(drawn: Resampled) -> dict[str, np.ndarray]:
    return drawn.ranking_metrics() | {"F1max": drawn.best_f1()[0]}


@given(PAIRS)
def test_labelled_pairs_are_scored_as_by_scikit_learn(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    totals = labelled_ladder(scores, labels, np.arange(len(pairs))).totals
    expected = _by_scikit_learn(scores, labels)
    assert _found(totals) == pytest.approx(expected)
    f1, threshold = best_f1(totals)
    assert sklearn.metrics.f1_score(labels, scores >= threshold) == pytest.approx(f1)
    true, false, positives = counts_at(totals, threshold)
    assert true == (labels & (scores >= threshold)).sum()
    assert false == (~labels & (scores >= threshold)).sum()
    assert positives == labels.sum()
    assert f1_of(true, false, positives) == pytest.approx(f1)


def test_of_equal_f1_the_highest_threshold_counts_in_resamples_too() -> None:
    """2/3 with the best pair alone, 1 of 1, and with all four, 2 of 4."""
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, False, True])
    ladder = labelled_ladder(scores, labels, np.arange(4))
    assert best_f1(ladder.totals) == (pytest.approx(2 / 3), 0.9)
    f1, threshold = Resampled(ladder, np.ones((1, 4), np.float32)).best_f1()
    assert (f1[0], threshold[0]) == (pytest.approx(2 / 3), 0.9)


@given(PAIRS)
def test_the_most_accurate_threshold_by_trying_all(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    threshold = best_accuracy_threshold(
        labelled_ladder(scores, labels, np.arange(len(pairs))).totals
    )
    tried = [*np.unique(scores), 9.0]
    accuracy = [np.mean((scores >= t) == labels) for t in tried]
    assert np.isfinite(threshold)
    assert np.mean((scores >= threshold) == labels) == pytest.approx(max(accuracy))


@given(PAIRS, st.integers(0, 2**32 - 1))
def test_each_resample_is_scored_as_by_scikit_learn(
    pairs: list[tuple[float, bool]], seed: int
) -> None:
    scores, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    rows = np.arange(len(pairs))
    # stratified, as in the evaluation: both labels are in every resample
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [rng.choice(rows[mask], (4, mask.sum())) for mask in (labels, ~labels)], axis=1
    )
    counts = np.stack([np.bincount(row, minlength=len(rows)) for row in drawn]).astype(np.float32)
    resampled = Resampled(labelled_ladder(scores, labels, rows), counts)
    found, thresholds = _resampled(resampled), resampled.best_f1()[1]
    for i, row in enumerate(drawn):
        expected = _by_scikit_learn(scores[row], labels[row])
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected)
        at = sklearn.metrics.f1_score(labels[row], scores[row] >= thresholds[i])
        assert at == pytest.approx(expected["F1max"])
    given_thresholds = rng.uniform(-1, 1, 4)
    f1 = f1_of(*resampled.counts_at(given_thresholds))
    expected_f1 = [
        sklearn.metrics.f1_score(labels[row], scores[row] >= t)
        for row, t in zip(drawn, given_thresholds, strict=True)
    ]
    np.testing.assert_allclose(f1, expected_f1)


def test_a_ladder_of_some_rows_leaves_the_others_out() -> None:
    rng = np.random.default_rng(0)
    scores, labels, rows = rng.normal(size=40), rng.random(40) < 0.5, np.arange(0, 40, 3)
    ladder = labelled_ladder(scores, labels, rows)
    assert _found(ladder.totals) == pytest.approx(_by_scikit_learn(scores[rows], labels[rows]))
    assert ladder.positive_mean == pytest.approx(scores[rows][labels[rows]].mean())
    assert ladder.negative_mean == pytest.approx(scores[rows][~labels[rows]].mean())
    counts = np.ones((1, 40), np.float32)
    assert _resampled(Resampled(ladder, counts)) == pytest.approx(_found(ladder.totals))


# --- positives only ------------------------------------------------------------------------------


def _grid(size: int, seed: int, levels: int | None = None):
    """Unit vectors, rounded angles (hence ties) where levels are given, and who knows whom."""
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, np.pi, size=(2, size))
    if levels:
        angle = np.round(angle * levels) / levels
    a, b = (np.stack([np.cos(x), np.sin(x)], axis=1) for x in angle)
    known = [np.unique([i, *rng.integers(0, size, size=i % 3)]) for i in range(size)]
    return a, b, np.round(np.einsum("nd,nd->n", a, b), 12), known


def _all_pairs(a, b, cosines, known, rows):
    """The same pairs one by one: scores, labels, and the row each belongs to."""
    entries = [(cosines[i], True, i) for i in rows]
    for i in rows:
        for j in set(rows.tolist()) - set(known[i].tolist()):
            entries.append((np.round(a[i] @ b[j], 12), False, i))
    return tuple(np.array(column) for column in zip(*entries, strict=True))


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize("levels", [None, 5])
def test_everything_off_the_diagonal_is_counted(tile: int, levels: int | None) -> None:
    data = _grid(40, 1, levels)
    rows = np.flatnonzero(np.arange(40) % 4 != 2)
    scores, labels, owner = _all_pairs(*data, rows)
    ladder = off_diagonal_ladder(*data, rows, tile=tile)
    assert _found(ladder.totals) == pytest.approx(_by_scikit_learn(scores, labels))
    assert ladder.totals.negatives.sum() == (~labels).sum()
    assert ladder.positive_mean == pytest.approx(scores[labels].mean())
    assert ladder.negative_mean == pytest.approx(scores[~labels].mean())

    drawn = np.random.default_rng(2).choice(rows, (5, len(rows)))
    counts = np.stack([np.bincount(row, minlength=40) for row in drawn]).astype(np.float32)
    found = _resampled(Resampled(ladder, counts))
    for i in range(5):
        repeated = np.repeat(np.arange(len(scores)), counts[i, owner].astype(int))
        expected = _by_scikit_learn(scores[repeated], labels[repeated])
        assert {name: values[i] for name, values in found.items()} == pytest.approx(expected)


def test_beyond_the_limit_totals_are_exact_and_resamples_close(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(600, 8))
    b = a + 0.9 * rng.normal(size=a.shape)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    data = a, b, np.einsum("nd,nd->n", a, b), [np.array([i]) for i in range(600)]
    exact = off_diagonal_ladder(*data, np.arange(600))
    monkeypatch.setattr(ladders, "MAX_RESAMPLED_POSITIVES", 150)
    coarse = off_diagonal_ladder(*data, np.arange(600))
    assert exact.negatives.shape == (600, 1201) and coarse.negatives.shape[1] <= 301
    assert _found(coarse.totals) == _found(exact.totals)
    counts = rng.multinomial(600, np.full(600, 1 / 600), 20).astype(np.float32)
    close, expected = (_resampled(Resampled(ladder, counts)) for ladder in (coarse, exact))
    for name, tolerance in {"ROC-AUC": 0.0005, "AP": 0.005, "F1max": 0.01}.items():
        np.testing.assert_allclose(close[name], expected[name], atol=tolerance, err_msg=name)
        assert expected[name].std() > tolerance  # far below the noise of the bootstrap itself


def test_a_collapsed_encoder_is_at_chance() -> None:
    vector = np.random.default_rng(0).normal(size=37)
    same = np.tile(vector / np.linalg.norm(vector), (50, 1))
    known = [np.array([i]) for i in range(50)]
    ladder = off_diagonal_ladder(same, same, np.ones(50), known, np.arange(50))
    assert ranking_metrics(ladder.totals) == {"ROC-AUC": 0.5, "AP": pytest.approx(1 / 50)}
