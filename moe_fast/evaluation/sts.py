"""Evaluates semantic textual similarity: how well cosines agree with human scores."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.options import EncodeOptions
from moe_fast.evaluation.columns import read_columns
from moe_fast.evaluation.cosines import embed_pairs, pairwise_cosine
from moe_fast.evaluation.optional import require
from moe_fast.evaluation.result import (
    ALL_DOMAINS,
    Bootstrap,
    Evaluation,
    GroupedItems,
    Metrics,
    evaluation_of,
    fingerprint,
)

logger = logging.getLogger(__name__)


class StsItems(GroupedItems):
    """N pairs with cosines and human scores; the metrics are the correlations in each group.

    Attributes:
        cosines: [N] float64, the model's similarities.
        gold: [N] float64, the human scores.
    """

    def __init__(
        self, cosines: NDArray[np.float64], columns: dict[str, list[Any]], by_domain: bool
    ) -> None:
        domains = columns.get("domain") if by_domain else None
        data = fingerprint(columns["a"], columns["b"], columns["score"], domains)
        super().__init__(domains, len(cosines), data)
        self.cosines = cosines
        self.gold = np.asarray(columns["score"], dtype=np.float64)

    def details(self) -> dict[str, dict[str, Any]]:
        """Return the number of pairs, and the lowest and highest human score, of every group."""
        return {
            group: {
                "pairs": len(rows),
                "lowest_score": float(self.gold[rows].min()),
                "highest_score": float(self.gold[rows].max()),
            }
            for group, rows in self.groups.items()
        }

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """Compute the correlations of R resamples, given as indices of pairs [R, N]; [R] each."""
        stats = require("scipy.stats")
        found = {}
        for group, columns in self.columns.items():
            pair = self.cosines[rows[:, columns]], self.gold[rows[:, columns]]
            ranks = [stats.rankdata(values, axis=-1) for values in pair]
            found[group] = {"Spearman": _correlation(*ranks), "Pearson": _correlation(*pair)}
        return found


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute Pearson's r along the last axis; NaN for fewer than two or constant values."""
    if x.shape[-1] < 2:
        return np.full(x.shape[0], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # for constant values, which give NaN
        return np.asarray(require("scipy.stats").pearsonr(x, y, axis=-1).statistic)


def evaluate_sts(
    model: Any,
    dataset: Any,
    *,
    name: str | None = None,
    by_domain: bool = True,
    encode: EncodeOptions | None = None,
    bootstrap: Bootstrap | None = None,
) -> Evaluation:
    """Compute the Spearman and Pearson correlations of a model's cosines with human scores.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        dataset: columns ``a``, ``b``, ``score`` and, optionally, ``domain``; see
            `moe_fast.data.read_sts`.
        name: the model's name in the result; by default that of its class.
        by_domain: also compute each domain's correlations.
        encode: how texts are encoded.
        bootstrap: settings of the intervals; pairs are resampled within their domains.

    Returns:
        An `Evaluation` with the metrics ``"Spearman"`` and ``"Pearson"``. A metric is NaN if all
        cosines or all scores of a domain are the same; if this is so in a resample, there is no
        interval. Details: the number of ``pairs``, and ``lowest_score`` and ``highest_score``,
        which show the scale. The correlation over all domains mixes their scales; a warning says so
        if these seem to differ.

    Raises:
        ValueError: a column is missing, or a value is invalid; see
            `moe_fast.evaluation.columns.read_columns`.
        ValueError: a score is not a finite number, or all scores are the same.
        ValueError: as `moe_fast.evaluation.embed`.
        ImportError: scipy or scikit-learn is not installed.
    """
    columns = read_columns(dataset, ("a", "b", "score"), ("domain",))
    _check_gold(columns["score"])
    a, b, settings = embed_pairs(model, columns, encode)
    items = StsItems(pairwise_cosine(a, b), columns, by_domain)
    details = items.details()
    _warn_of_scales(details)
    return evaluation_of(
        "sts",
        name or type(model).__name__,
        items,
        details=details,
        settings=settings,
        bootstrap=bootstrap,
    )


def _warn_of_scales(details: dict[str, dict[str, Any]]) -> None:
    """Warn if the range of one domain's scores is more than twice as wide as another's."""
    ranges = {
        domain: (found["lowest_score"], found["highest_score"])
        for domain, found in details.items()
        if domain != ALL_DOMAINS
    }
    widths = [high - low for low, high in ranges.values() if high > low]
    if widths and max(widths) > 2 * min(widths):
        shown = ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items())
        logger.warning(
            "The domains' scores seem to have different scales (%s): the correlation over all "
            "mixes them.",
            shown,
        )


def _check_gold(scores: list[Any]) -> None:
    for row, score in enumerate(scores):
        if isinstance(score, (bool, str)) or score is None or not math.isfinite(score):
            raise ValueError(f"dataset, row {row}: score must be a finite number; got {score!r}")
    if len(set(scores)) < 2:
        raise ValueError(
            f"dataset: a correlation needs different scores; all {len(scores)} are {scores[0]!r}"
        )
