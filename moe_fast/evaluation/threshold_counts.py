"""Cosines of pairs as a ladder of levels, from which every metric of a threshold follows.

A ladder says for each row of the data (a pair, or an anchor with everything it is compared with)
how many positives and negatives it has at each level. Metrics of the whole come from scikit-learn,
with the counts as weights. Those of thousands of resamples come from the same counts multiplied by
how often each row was drawn, all resamples at once, which scikit-learn has no form for; the tests
compare them with scikit-learn one by one.
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
    """Counts over all rows.

    Attributes:
        thresholds: [L] float64, rising; "positive" means a cosine of at least this much.
        positives, negatives: [L], how many of each have a cosine at this level.
    """

    thresholds: NDArray[np.float64]
    positives: NDArray[np.float64]
    negatives: NDArray[np.float64]


@dataclass(frozen=True)
class Ladder:
    """Counts by row.

    Attributes:
        rows: [n] the numbers of the rows in the data set.
        totals: the exact counts over all rows.
        thresholds: [L] float64, rising, of the levels below.
        positives, negatives: [n, L], dense or sparse: what each row has at each level.
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
    """Of labelled pairs, each of them one row.

    Args:
        cosines: [N] of the whole data set.
        labels: [N] bool, whether a pair is a positive.
        rows: [n] the pairs that count.
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
    """Of positives only: every other `b` among `rows` is a negative of an `a`, in tiles.

    The total counts are exact: between two positives' cosines all thresholds give the same true
    positives, so that counting the negatives there loses nothing. By row, at most
    `MAX_RESAMPLED_POSITIVES` of the positives' cosines are kept.

    Args:
        a, b: [N, d] unit vectors of the whole data set, dense or sparse.
        cosines: [N] of the positives.
        known: for each a the numbers of all b that are no negatives of it.
        rows: [n] the pairs that count.
        tile: rows of `a` at a time, so that no more than ``tile`` x n cosines are held.
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
    """At most `MAX_RESAMPLED_POSITIVES` of the rising `cosines`, the first and the last among them.

    Closest together at the top, where precision turns on single pairs, and at the bottom, where a
    good model has its negatives: in steps of a constant share of the positives beyond.
    """
    count = len(cosines)
    if count <= MAX_RESAMPLED_POSITIVES:
        return cosines
    steps = np.geomspace(1, count, MAX_RESAMPLED_POSITIVES // 2).round().astype(int)
    return cosines[np.union1d(steps - 1, count - steps)]


def _levels(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Thresholds of 2 n + 1 levels: below the first value, at it, above it, at the second, ..."""
    levels = np.empty(2 * len(values) + 1)
    levels[0], levels[1::2], levels[2::2] = -np.inf, values, np.nextafter(values, np.inf)
    return levels


def _level_of(scores: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The level of each score in ``_levels(values)``."""
    below = np.searchsorted(values, scores)
    at = values[np.minimum(below, len(values) - 1)] == scores
    return 2 * below + at


# --- metrics --------------------------------------------------------------------------------------


def ranking_metrics(totals: Totals) -> dict[str, float]:
    """ROC-AUC and average precision, by scikit-learn."""
    metrics = require("sklearn.metrics")
    sample = _as_sample(totals)
    return {
        "ROC-AUC": float(metrics.roc_auc_score(**sample)),
        "AP": float(metrics.average_precision_score(**sample)),
    }


def best_f1(totals: Totals) -> tuple[float, float]:
    """(the largest F1 of any threshold, the highest such threshold), by scikit-learn."""
    sample = _as_sample(totals)
    precision, recall, levels = require("sklearn.metrics").precision_recall_curve(**sample)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return float(f1[best]), float(totals.thresholds[int(levels[best])])


def best_accuracy_threshold(totals: Totals) -> float:
    """The highest of the thresholds with the largest accuracy, by scikit-learn's ROC curve."""
    false_rate, true_rate, levels = require("sklearn.metrics").roc_curve(
        **_as_sample(totals), drop_intermediate=False
    )
    correct = true_rate * totals.positives.sum() + (1 - false_rate) * totals.negatives.sum()
    best = int(np.argmax(correct))
    if best == 0:  # nothing is called a positive
        return float(np.nextafter(totals.thresholds[-1], np.inf))
    return float(totals.thresholds[int(levels[best])])


def counts_at(totals: Totals, threshold: float) -> tuple[float, float, float]:
    """(true positives, false positives, all positives) when positive means >= threshold."""
    above = totals.thresholds >= threshold
    return (
        float(totals.positives[above].sum()),
        float(totals.negatives[above].sum()),
        float(totals.positives.sum()),
    )


def _as_sample(totals: Totals) -> dict[str, Any]:
    """Arguments of scikit-learn's metrics; scores are the levels' numbers."""
    levels = np.arange(len(totals.thresholds))
    return {
        "y_true": np.repeat([1, 0], len(levels)),
        "y_score": np.tile(levels, 2).astype(np.float64),
        "sample_weight": np.concatenate([totals.positives, totals.negatives]),
    }


# --- resamples ------------------------------------------------------------------------------------


class Resampled:
    """A ladder's counts in R resamples, summed from the top.

    Args:
        ladder: of the data set.
        counts: [R, N], how often each of its rows was drawn.

    Attributes:
        thresholds: [L] rising.
        positives: [R, L] at each level.
        negatives: [R, L] likewise.
        true_positives, false_positives: [R, L] at each level and above.
    """

    def __init__(self, ladder: Ladder, counts: NDArray[np.float32]) -> None:
        drawn = np.ascontiguousarray(counts[:, ladder.rows])
        self.thresholds = ladder.thresholds
        self.positives = np.asarray(drawn @ ladder.positives, dtype=np.float64)
        self.negatives = np.asarray(drawn @ ladder.negatives, dtype=np.float64)
        self.true_positives = _from_the_top(self.positives)
        self.false_positives = _from_the_top(self.negatives)

    def ranking_metrics(self) -> dict[str, NDArray[np.float64]]:
        """As the function of this name, [R] each."""
        tp, fp = self.true_positives, self.false_positives
        # a negative beaten by every positive above it, and by half of those at its level
        beaten = (self.negatives * (tp - self.positives / 2)).sum(-1)
        with np.errstate(invalid="ignore"):
            precision = np.where(tp > 0, tp / (tp + fp), 0.0)
            return {
                "ROC-AUC": beaten / (tp[:, 0] * fp[:, 0]),
                "AP": (self.positives * precision).sum(-1) / tp[:, 0],
            }

    def best_f1(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As the function of this name: (F1 [R], threshold [R])."""
        f1 = f1_of(self.true_positives, self.false_positives, self.true_positives[:, :1])
        best = f1.shape[1] - 1 - np.argmax(f1[:, ::-1], axis=1)
        return np.take_along_axis(f1, best[:, None], 1)[:, 0], self.thresholds[best]

    def counts_at(self, thresholds: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """As the function of this name, at one threshold per resample."""
        first = np.searchsorted(self.thresholds, thresholds)[:, None]
        inside = first < len(self.thresholds)
        at = np.minimum(first, len(self.thresholds) - 1)
        found = [
            np.where(inside, np.take_along_axis(counts, at, 1), 0.0)[:, 0]
            for counts in (self.true_positives, self.false_positives)
        ]
        return (*found, self.true_positives[:, 0])


def f1_of(true_positives: Any, false_positives: Any, positives: Any) -> Any:
    """F1 = 2 TP / (TP + FP + all positives), of numbers or arrays."""
    return 2 * true_positives / (true_positives + false_positives + positives)


def _from_the_top(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]
