from __future__ import annotations

import math

import pytest

from moe_fast.evaluation import Comparison, Evaluation, Score, format_table
from moe_fast.evaluation.report import format_number

SETTINGS = {"bootstrap": {"confidence": 0.9, "resamples": 10, "seed": 0}}


def _evaluation(model: str = "m|1", task: str = "pairs") -> Evaluation:
    scores = {
        "x": {"AP": Score(0.6141, 0.5884, 0.6399), "F1": Score(math.nan)},
        "all": {"AP": Score(1.0, 0.9996, 1.0), "F1": Score(0.5)},
    }
    details = {"x": {"pairs": 7}, "all": {"pairs": 1200}}
    return Evaluation(task, model, scores, details, SETTINGS, None)


COMPARISON = Comparison(
    "pairs",
    "m|1",
    "n",
    {"all": {"AP": Score(0.0381, -0.0004, 0.049), "F1": Score(-0.25)}},
    SETTINGS,
)


def test_a_table_for_a_terminal() -> None:
    assert format_table([_evaluation()], [COMPARISON]).splitlines() == [
        "system   domain  pairs  AP [90 %]             F1 [90 %]",
        "m|1      x       7      .614 [.588, .640]     -",
        "m|1      all     1200   1.000 [1.000, 1.000]  .500",
        "m|1 - n  all            +.038 [-.000, +.049]  -.250",
    ]


def test_a_table_for_markdown() -> None:
    lines = format_table([_evaluation(), _evaluation("n")], markdown=True).splitlines()
    assert len(lines) == 2 + 4
    assert set(lines[1]) == {"|", "-", " "}
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    assert cells[0] == ["| system", "domain", "pairs", "AP [90 %]", "F1 [90 %] |"]
    assert cells[2][:2] == [r"| m\|1", "x"]
    assert {len(row) for row in cells} == {5}


def test_numbers() -> None:
    numbers = [0.6141, -0.05, 1.0, -1.0, 0.99962, 0.0]
    assert [format_number(x) for x in numbers] == [
        ".614", "-.050", "1.000", "-1.000", "1.000", ".000"
    ]  # fmt: skip
    assert format_number(0.05, signed=True) == "+.050"


def test_one_table_shows_one_task() -> None:
    with pytest.raises(ValueError, match="nothing to show"):
        format_table([])
    with pytest.raises(ValueError, match=r"one task and the same metrics; got \('pairs', .*'sts'"):
        format_table([_evaluation(), _evaluation(task="sts")])
