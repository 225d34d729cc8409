from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moe_fast.evaluation.bootstrap import bootstrap_bounds


def interval(values: np.ndarray, **settings) -> tuple[float, float]:
    """Of the mean."""
    rows = [np.arange(len(values))]
    low, high = bootstrap_bounds(rows, lambda rows: values[rows].mean(-1)[None], **settings)
    return float(low[0]), float(high[0])


def test_bootstrap_is_seeded_and_close_to_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    first = interval(values, seed=1)
    assert first == interval(values, seed=1)
    assert first != interval(values, seed=2)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert first[0] == pytest.approx(values.mean() - half_width, abs=0.04)
    assert first[1] == pytest.approx(values.mean() + half_width, abs=0.04)


def test_a_constant_has_an_interval_of_no_width() -> None:
    assert interval(np.full(10, 0.25), resamples=50) == (0.25, 0.25)


def test_the_bounds_are_scipys() -> None:
    values = np.random.default_rng(3).normal(size=50)
    ours = interval(values, resamples=300, seed=4)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=300,
        method="percentile",
        batch=256,
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert ours == (theirs.low, theirs.high)


def test_every_stratum_keeps_its_size_and_its_place() -> None:
    strata = [np.array([0, 4, 7]), np.array([2]), np.array([1, 3, 5, 6])]
    seen = []

    def statistic(rows: np.ndarray) -> np.ndarray:
        seen.append(rows)
        return rows.mean(-1)[None].astype(float)

    bootstrap_bounds(strata, statistic, resamples=40)
    rows = np.concatenate(seen)
    assert rows.shape == (40, 8)
    for columns, stratum in zip(np.split(rows, [3, 4], axis=1), strata, strict=True):
        assert set(columns.ravel()) == set(stratum)
    assert len(np.unique(rows, axis=0)) > 30


def test_many_items_are_drawn_a_few_resamples_at_a_time() -> None:
    sizes = []

    def statistic(rows: np.ndarray) -> np.ndarray:
        sizes.append(rows.shape)
        return np.zeros((1, len(rows)))

    bootstrap_bounds([np.arange(1_000_000)], statistic, resamples=6)
    assert sizes == [(4, 1_000_000), (2, 1_000_000)]


def test_an_undefined_resample_leaves_the_bounds_undefined() -> None:
    def statistic(rows: np.ndarray) -> np.ndarray:
        spread = rows.std(-1)  # 0 in a resample of one item only, certain among 500 of 3 items
        return np.stack([np.where(spread > 0, spread, np.nan), rows.mean(-1)])

    low, high = bootstrap_bounds([np.arange(3)], statistic, resamples=500)
    assert np.isnan([low[0], high[0]]).all()
    assert 0 <= low[1] < high[1] <= 2


def test_one_item_is_the_same_in_every_resample() -> None:
    low, high = bootstrap_bounds([np.array([3])], lambda rows: rows.mean(-1)[None].astype(float))
    assert (low, high) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("strata", "options", "message"),
    [
        ([], {}, "at least one item"),
        ([np.arange(3)], {"confidence": 1.0}, "got 1.0"),
        ([np.arange(3)], {"resamples": 0}, "resamples must be at least 1; got 0"),
    ],
)
def test_bounds_say_what_is_wrong(strata: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_bounds(strata, lambda rows: rows.mean(-1)[None], **options)
