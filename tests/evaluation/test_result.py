from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_fast.evaluation import Bootstrap, compare, evaluate_sts
from moe_fast.evaluation.result import by_group, json_ready
from tests.evaluation.fakes import TableEncoder

DATA = {"a": list("abcd"), "b": list("efgh"), "score": [0, 1, 2, 3]}
FEW = Bootstrap(resamples=20)


def test_groups_are_the_domains_sorted_and_last_all() -> None:
    groups = by_group(["y", "x", "y"], 3)
    assert list(groups) == ["x", "y", "all"]
    assert [rows.tolist() for rows in groups.values()] == [[1], [0, 2], [0, 1, 2]]
    assert list(by_group(None, 2)) == ["all"]
    with pytest.raises(ValueError, match="'all' is the name of all domains together"):
        by_group(["all"], 1)


def test_json_has_no_word_for_what_is_not_finite() -> None:
    value = {"a": (math.nan, 1.0, np.float64(2.5)), "b": {"c": [math.inf, np.int64(3), "x"]}}
    assert json_ready(value) == {"a": [None, 1.0, 2.5], "b": {"c": [None, 3, "x"]}}


def test_a_comparison_with_itself_is_zero() -> None:
    found = evaluate_sts(TableEncoder(), DATA, name="m", bootstrap=FEW)
    comparison = compare(found, found, bootstrap=Bootstrap(resamples=0))
    scores = comparison.to_dict()["differences"]["all"]
    assert scores["Pearson"] == {"value": 0.0, "low": None, "high": None}
    assert comparison.to_dict()["first"] == comparison.to_dict()["second"] == "m"


@pytest.mark.parametrize("column", ["a", "b", "score"])
def test_other_items_cannot_be_compared(column: str) -> None:
    first = evaluate_sts(TableEncoder(), DATA, name="one", bootstrap=FEW)
    other = evaluate_sts(
        TableEncoder(), DATA | {column: DATA[column][::-1]}, name="two", bootstrap=FEW
    )
    with pytest.raises(ValueError, match=r"first \(one: sts\) and second \(two: sts\) were not"):
        compare(first, other)


def test_other_metrics_cannot_be_compared() -> None:
    first = evaluate_sts(TableEncoder(), DATA, bootstrap=FEW)
    scores = {"all": {"Pearson": first.scores["all"]["Pearson"]}}
    with pytest.raises(ValueError, match="different metrics"):
        compare(first, replace(first, scores=scores))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence": 95}, "between 0 and 1; got 95"),
        ({"resamples": -1}, "at least 0; got -1"),
    ],
)
def test_settings_of_the_bootstrap(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bootstrap(**settings)
