"""The grid of experts: it runs and is checked, and its summary says what the record says."""

from __future__ import annotations

import pytest
import torch

from bench import experts, products
from bench.cases import OURS, measure
from bench.harness import Summary
from bench.problem import HALF, Problem, bert
from bench.record import Row


def test_the_grid_has_both_loads_and_times_everyone():
    found = {}
    for case in experts.cases("tiny"):
        rows = measure(case, seconds=0, rounds=1, min_sample_seconds=0)
        found[case.operation] = {row.who for row in rows if row.ratio}
    everyone = {OURS, "eager", "batched_mm", "grouped_mm", "dense"}
    assert found == {
        "experts, balanced": everyone,
        "experts, half to one expert": everyone,
    }


def test_half_of_the_tokens_go_to_one_expert():
    problem = Problem(bert(4000, 32, 2, torch.float32, load=HALF))
    assert 0.55 < (problem.top_k_index == 0).any(1).float().mean() < 0.7  # 1/2 + 1/2 * 2/8


def row(tokens: int, who: str, median: float, dtype: str = "bfloat16") -> Row:
    ratio = Summary(median, median - 0.1, median + 0.1, 5)
    return Row("experts, balanced", {"T": tokens}, dtype, who, OURS, ratio=ratio)


def test_the_summary_takes_the_best_peer_of_each_case():
    rows = [row(1, "eager", 2.0), row(1, "grouped_mm", 4.0), row(2, "eager", 0.5)]
    rows += [row(2, "dense", 0.1), row(1, "eager", 0.95, "float32")]
    bf16, f32 = experts.summary(rows).splitlines()
    assert bf16.startswith("bfloat16: 2 cases, geometric mean 1.00, least 0.50 ")
    assert bf16.endswith("1 below 1 outside the quartiles")
    assert f32.endswith("0 below 1 outside the quartiles")  # .95 to 1.05


@pytest.mark.parametrize(("dots", "most"), [([0.5, 1.0, 3.0], 2), ([2.0, 0.1, 0.1], 0)])
def test_dots_serve_up_to_the_first_number_of_rows_where_they_are_slower(dots, most, monkeypatch):
    monkeypatch.setattr(products, "ROWS", (1, 2, 4))
    found = {384: {"dots": dots, "tiles": [1.0] * 3}, 768: {"dots": [1.0] * 3, "tiles": [1.0] * 3}}
    assert products.most_rows_of_dots(found, "tiles") == most
