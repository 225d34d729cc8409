"""Evaluates semantic textual similarity: how well the cosine ranks pairs scored by people."""

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
    """Scored pairs, whose metrics are the correlations of every group.

    Attributes:
        cosines, gold: [N] float64, the model's and people's similarity.
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
        """Of every group, how many pairs it has, and from where to where their scores go."""
        return {
            group: {
                "pairs": len(rows),
                "lowest_score": float(self.gold[rows].min()),
                "highest_score": float(self.gold[rows].max()),
            }
            for group, rows in self.groups.items()
        }

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """The correlations of resamples: items [R, N] -> [R] each."""
        stats = require("scipy.stats")
        found = {}
        for group, columns in self.columns.items():
            pair = self.cosines[rows[:, columns]], self.gold[rows[:, columns]]
            ranks = [stats.rankdata(values, axis=-1) for values in pair]
            found[group] = {"Spearman": _correlation(*ranks), "Pearson": _correlation(*pair)}
        return found


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's r along the last axis; NaN where too few or constant."""
    if x.shape[-1] < 2:
        return np.full(x.shape[0], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of constants, whose result is NaN
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
    """Correlates the cosine with people's scores, by Spearman and by Pearson.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        dataset: columns ``a``, ``b``, ``score`` and, optionally, ``domain``; see
            `moe_fast.data.read_sts`.
        name: of the model in the result; by default that of its class.
        by_domain: also give each domain's correlations.
        encode: how texts are encoded.
        bootstrap: settings of the intervals; pairs are resampled within their domain.

    Returns:
        An `Evaluation` with the metrics ``"Spearman"`` and ``"Pearson"``, NaN (and no interval)
        where the cosines or the scores of a domain, or of a resample of it, are all the same.
        Details: numbers of pairs, and the lowest and the highest score, which tell the scale. A
        correlation does not depend on the scale, but over all domains it mixes different ones: a
        warning says so.

    Raises:
        ValueError: a missing column, fewer than two pairs, a score that is no finite number,
            scores that are all the same, or as `moe_fast.evaluation.embed`.
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
    """Say where one domain's scores all lie in a small part of another's range."""
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
