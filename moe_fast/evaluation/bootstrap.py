"""Computes percentile bootstrap intervals of one system, or of the difference of two.

``scipy.stats.bootstrap`` does the resampling and takes the percentiles. The *indices* of the items
are resampled, so that any statistic can be used, and two systems get the same resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.optional import require

_INDICES_AT_ONCE = 4_000_000  # bounds the memory: this many indices are drawn at a time


def bootstrap_bounds(
    strata: Sequence[NDArray[np.int64]],
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the bounds of M statistics of N items.

    Args:
        strata: the indices of the items of each stratum. A stratum has the same size in every
            resample.
        statistic: a function of R resamples, given as the indices [R, N] of their items, with the
            strata side by side in the order given. It returns the statistics [M, R].
        confidence: the confidence level of the interval, between 0 and 1.
        resamples: the number of resamples.
        seed: the same seed gives the same resamples, whatever the statistic.

    Returns:
        (low [M], high [M]). They are NaN for a statistic that is NaN in some resample.

    Raises:
        ValueError: the confidence is outside (0, 1), `resamples` is below 1, or there are no items.
        ImportError: scipy is not installed.
    """
    size = sum(map(len, strata))
    check_bootstrap(confidence, resamples)
    if size == 0:
        raise ValueError("strata must hold at least one item; got none")
    # scipy requires two items per sample; a stratum of one item is the same in every resample
    drawn = [np.asarray(rows) for rows in strata if len(rows) > 1]

    def of_all_strata(*resampled: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        parts = iter(resampled)
        count = len(resampled[0])
        columns = [
            next(parts) if len(rows) > 1 else np.broadcast_to(rows, (count, len(rows)))
            for rows in strata
        ]
        return statistic(np.concatenate(columns, axis=1))

    if not drawn:
        value = statistic(np.concatenate(strata)[None])[:, 0]
        return value, value
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # undefined statistics become NaN
        interval = (
            require("scipy.stats")
            .bootstrap(
                drawn,
                of_all_strata,
                vectorized=True,
                confidence_level=confidence,
                n_resamples=resamples,
                batch=int(np.clip(_INDICES_AT_ONCE // size, 1, 256)),
                method="percentile",
                rng=np.random.default_rng(seed),
            )
            .confidence_interval
        )
    return np.asarray(interval.low), np.asarray(interval.high)


def check_bootstrap(confidence: float, resamples: int) -> None:
    """Raise an error for settings that `bootstrap_bounds` cannot use; call it before other work.

    Raises:
        ValueError: the confidence is outside (0, 1), or `resamples` is below 1.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1; got {resamples}")
