"""Counts positives and negatives per level of the cosine, and computes metrics from the counts.

The range of the cosines is divided into levels by thresholds, like the rungs of a ladder. A
`Ladder` has, for each row of the data (a labelled pair, or an `a` with all the `b` it is compared
with), the number of positives and negatives at each level. scikit-learn computes the metrics of the
data set, with the counts as weights. For thousands of resamples the counts are multiplied by how
often each row was drawn, and the metrics of all resamples are computed at once, which scikit-learn
cannot do; the tests compare them with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.cosines import all_cosines
from moe_fast.evaluation.optional import require

MAX_RESAMPLED_POSITIVES = 1000  # distinct cosines of positives that a resampled ladder keeps


@dataclass(frozen=True)
class Totals:
    """The numbers of positives and negatives at each level, over all rows.

    Attributes:
        thresholds: [L] float64, rising: the smallest cosine of each level.
        positives, negatives: [L], how many of them have a cosine at each level.
    """

    thresholds: NDArray[np.float64]
    positives: NDArray[np.float64]
    negatives: NDArray[np.float64]


@dataclass(frozen=True)
class Ladder:
    """The numbers of positives and negatives at each level, for each row.

    Attributes:
        rows: [n], the indices of the rows in the data set.
        totals: the exact counts over all rows, with levels of their own.
        thresholds: [L] float64, rising: the smallest cosine of each level of the counts per row.
        positives, negatives: [n, L], dense or sparse: each row's number at each level.
        negative_mean: mean cosine of the negatives.
        positive_mean: mean cosine of the positives.
    """

    rows: NDArray[np.int64]
    totals: Totals
    thresholds: NDArray[np.float64]
    positives: Any
    negatives: Any
    positive_mean: float
    negative_mean: float


def labelled_ladder(
    cosines: NDArray[np.float64], labels: NDArray[np.bool_], rows: NDArray[np.int64]
) -> Ladder:
    """Make a ladder of labelled pairs; each pair is one row.

    Args:
        cosines: [N], the cosines of all pairs of the data set.
        labels: [N] bool, whether each pair is a positive.
        rows: [n], the indices of the pairs to use.
    """
    scores, positive = cosines[rows], labels[rows]
    thresholds, level = np.unique(scores, return_inverse=True)
    shape = (len(rows), len(thresholds))
    csr = require("scipy.sparse").csr_array
    places = (np.arange(len(rows)), level)
    positives = csr((positive.astype(np.float32), places), shape=shape)
    negatives = csr(((~positive).astype(np.float32), places), shape=shape)
    totals = Totals(
        thresholds,
        positives=np.bincount(level, positive, len(thresholds)).astype(np.float64),
        negatives=np.bincount(level, ~positive, len(thresholds)).astype(np.float64),
    )
    means = float(scores[positive].mean()), float(scores[~positive].mean())
    return Ladder(rows, totals, thresholds, positives, negatives, *means)


def off_diagonal_ladder(
    a: Any,
    b: Any,
    cosines: NDArray[np.float64],
    known: list[NDArray[np.int64]],
    rows: NDArray[np.int64],
    *,
    tile: int = 256,
) -> Ladder:
    """Make a ladder of pairs that are all positives; an `a` with another pair's `b` is a negative.

    The levels of the totals are the cosines of the positives and the intervals between them.
    Metrics from these counts are exact, because the number of true positives is the same for all
    thresholds in an interval. The counts per row use at most `MAX_RESAMPLED_POSITIVES` of these
    cosines.

    Args:
        a, b: [N, d], unit vectors of the whole data set, dense or sparse.
        cosines: [N], the cosines of the pairs.
        known: for each `a` the indices of all `b` that are no negatives of it.
        rows: [n], the indices of the pairs to use.
        tile: the number of rows of `a` at a time; ``tile`` x n cosines are in memory.
    """
    exact = np.unique(cosines[rows])
    kept = _kept(exact)
    thresholds, kept_thresholds = _levels(exact), _levels(kept)
    to_kept = _level_of(thresholds, kept)
    total = np.zeros(len(thresholds))
    by_row = np.zeros((len(rows), len(kept_thresholds)), np.float32)
    cosine_sum = 0.0
    others, column_of = b[rows], np.full(len(cosines), -1)
    column_of[rows] = np.arange(len(rows))
    for start in range(0, len(rows), tile):
        here = rows[start : start + tile]
        scores = all_cosines(a[here], others)
        negative = np.ones(scores.shape, dtype=bool)
        for i, row in enumerate(here):
            columns = column_of[known[row]]
            negative[i, columns[columns >= 0]] = False
        level = _level_of(scores[negative], exact)
        total += np.bincount(level, minlength=len(total))
        line = np.nonzero(negative)[0] * len(kept_thresholds) + to_kept[level]
        counts = np.bincount(line, minlength=len(here) * len(kept_thresholds))
        by_row[start : start + tile] = counts.reshape(len(here), -1)
        cosine_sum += float(scores[negative].sum())
    count = total.sum()
    places = np.arange(len(rows)), _level_of(cosines[rows], kept)
    ones = np.ones(len(rows), np.float32)
    positives = require("scipy.sparse").csr_array((ones, places), shape=by_row.shape)
    positive_total = np.bincount(_level_of(cosines[rows], exact), minlength=len(total))
    return Ladder(
        rows,
        Totals(thresholds, positive_total.astype(np.float64), total),
        kept_thresholds,
        positives,
        by_row,
        float(cosines[rows].mean()),
        float(cosine_sum / count) if count else np.nan,
    )


def _kept(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Choose at most `MAX_RESAMPLED_POSITIVES` of the rising `cosines`, with the first and last.

    They are closest together at the top, where single pairs change the precision, and at the
    bottom, where a good model has its negatives. The steps grow geometrically from both ends.
    """
    count = len(cosines)
    if count <= MAX_RESAMPLED_POSITIVES:
        return cosines
    steps = np.geomspace(1, count, MAX_RESAMPLED_POSITIVES // 2).round().astype(int)
    return cosines[np.union1d(steps - 1, count - steps)]


def _levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return thresholds of 2 n + 1 levels: below the first value, at it, above it, at the second.

    The levels alternate in this way to the last one, above all values.
    """
    levels = np.empty(2 * len(values) + 1)
    levels[0], levels[1::2], levels[2::2] = -np.inf, values, np.nextafter(values, np.inf)
    return levels


def _level_of(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the index of each score's level in ``_levels(values)``."""
    below = np.searchsorted(values, scores)
    at = values[np.minimum(below, len(values) - 1)] == scores
    return 2 * below + at


# --- metrics --------------------------------------------------------------------------------------


def ranking_metrics(totals: Totals) -> dict[str, float]:
    """Compute ROC-AUC and average precision, by scikit-learn."""
    metrics = require("sklearn.metrics")
    sample = _as_sample(totals)
    return {
        "ROC-AUC": float(metrics.roc_auc_score(**sample)),
        "AP": float(metrics.average_precision_score(**sample)),
    }


def best_f1(totals: Totals) -> tuple[float, float]:
    """Return the largest F1 of any threshold, and the highest threshold that has it."""
    sample = _as_sample(totals)
    precision, recall, levels = require("sklearn.metrics").precision_recall_curve(**sample)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return float(f1[best]), float(totals.thresholds[int(levels[best])])


def best_accuracy_threshold(totals: Totals) -> float:
    """Return the highest threshold with the largest accuracy."""
    false_rate, true_rate, levels = require("sklearn.metrics").roc_curve(
        **_as_sample(totals), drop_intermediate=False
    )
    correct = true_rate * totals.positives.sum() + (1 - false_rate) * totals.negatives.sum()
    best = int(np.argmax(correct))
    if best == 0:  # best if no pair is classified as positive
        return float(np.nextafter(totals.thresholds[-1], np.inf))
    return float(totals.thresholds[int(levels[best])])


def counts_at(totals: Totals, threshold: float) -> tuple[float, float, float]:
    """Count (true positives, false positives, all positives) at a threshold."""
    above = totals.thresholds >= threshold
    return (
        float(totals.positives[above].sum()),
        float(totals.negatives[above].sum()),
        float(totals.positives.sum()),
    )


def _as_sample(totals: Totals) -> dict[str, Any]:
    """Make the arguments of scikit-learn's metrics, with the indices of the levels as scores."""
    levels = np.arange(len(totals.thresholds))
    return {
        "y_true": np.repeat([1, 0], len(levels)),
        "y_score": np.tile(levels, 2).astype(np.float64),
        "sample_weight": np.concatenate([totals.positives, totals.negatives]),
    }


# --- resamples ------------------------------------------------------------------------------------


class Resampled:
    """The counts of a ladder in R resamples, and their sums from the top.

    Args:
        ladder: the ladder of the data set, or of one of its domains.
        counts: [R, N], how often each row of the data set was drawn.

    Attributes:
        thresholds: [L], rising: the smallest cosine of each level.
        positives, negatives: [R, L], their numbers at each level.
        true_positives, false_positives: [R, L], their numbers at each level and above.
    """

    def __init__(self, ladder: Ladder, counts: NDArray[np.float32]) -> None:
        drawn = np.ascontiguousarray(counts[:, ladder.rows])
        self.thresholds = ladder.thresholds
        self.positives = np.asarray(drawn @ ladder.positives, dtype=np.float64)
        self.negatives = np.asarray(drawn @ ladder.negatives, dtype=np.float64)
        self.true_positives = _from_the_top(self.positives)
        self.false_positives = _from_the_top(self.negatives)

    def ranking_metrics(self) -> dict[str, NDArray[np.float64]]:
        """Compute ROC-AUC and average precision, [R] each."""
        tp, fp = self.true_positives, self.false_positives
        # ROC-AUC counts, for each negative, the positives above it and half of those at its level
        beaten = (self.negatives * (tp - self.positives / 2)).sum(-1)
        with np.errstate(invalid="ignore"):
            precision = np.where(tp > 0, tp / (tp + fp), 0.0)
            return {
                "ROC-AUC": beaten / (tp[:, 0] * fp[:, 0]),
                "AP": (self.positives * precision).sum(-1) / tp[:, 0],
            }

    def best_f1(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the largest F1 of any threshold, and the highest threshold with it; [R] each."""
        f1 = f1_of(self.true_positives, self.false_positives, self.true_positives[:, :1])
        best = f1.shape[1] - 1 - np.argmax(f1[:, ::-1], axis=1)
        return np.take_along_axis(f1, best[:, None], 1)[:, 0], self.thresholds[best]

    def counts_at(self, thresholds: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Count (true positives, false positives, all positives), [R] each, at thresholds [R]."""
        first = np.searchsorted(self.thresholds, thresholds)[:, None]
        inside = first < len(self.thresholds)
        at = np.minimum(first, len(self.thresholds) - 1)
        found = [
            np.where(inside, np.take_along_axis(counts, at, 1), 0.0)[:, 0]
            for counts in (self.true_positives, self.false_positives)
        ]
        return (*found, self.true_positives[:, 0])


def f1_of(true_positives: Any, false_positives: Any, positives: Any) -> Any:
    """Compute F1 = 2 TP / (TP + FP + all positives), of numbers or arrays."""
    return 2 * true_positives / (true_positives + false_positives + positives)


def _from_the_top(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
