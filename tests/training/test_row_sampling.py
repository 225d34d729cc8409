"""Draws: functions of the seed, the epoch and the row; together with what belongs to them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.training.row_sampling import draw_passages, flag_row_columns, is_swapped


def make_row(positives: int = 3, negatives: int = 5, query: str = "q", **more) -> dict:
    """A row in which every list entry tells which one it is."""
    return {
        "query": query,
        "pos": [f"p{i}" for i in range(positives)],
        "neg": [f"n{i}" for i in range(negatives)],
        "neg_q": [f"q{i}" for i in range(negatives)],
        "pos_scores": [i + 0.5 for i in range(positives)],
        "neg_scores": [-i - 0.5 for i in range(negatives)],
        **more,
    }


rows = st.builds(make_row, st.integers(1, 5), st.integers(1, 9), st.text())


@given(rows, st.integers(0, 12), st.integers(0, 2**31), st.none() | st.integers(0, 1000))
def test_what_belongs_together_stays_together(row, wanted, seed, epoch):
    drawn = draw_passages(row, wanted, seed, epoch)
    assert list(drawn) == [*flag_row_columns(wanted, True), "label"]
    assert drawn["query"] == row["query"]
    positive = row["pos"].index(drawn["positive"])
    chosen = [row["neg"].index(drawn[f"negative_{g}"]) for g in range(1, wanted + 1)]
    queries = [drawn[f"negative_query_{g}"] for g in range(1, wanted + 1)]
    assert queries == [f"q{j}" for j in chosen]
    assert drawn["label"] == [positive + 0.5, *(-j - 0.5 for j in chosen)]
    counts = Counter(chosen)
    available = len(row["neg"])
    assert len(counts) == min(wanted, available)  # no repetition before all have had their turn
    if counts:
        assert max(counts.values()) - min(counts.values()) <= 1
    if epoch is None:
        assert positive == 0
        assert chosen == [g % available for g in range(wanted)]
    assert drawn == draw_passages(dict(row), wanted, seed, epoch)


def test_the_seed_and_the_epoch_change_the_draw():
    row = make_row(4, 12)
    by_epoch = {tuple(draw_passages(row, 3, 0, e)["label"]) for e in range(30)}
    by_seed = {tuple(draw_passages(row, 3, s, 0)["label"]) for s in range(30)}
    by_row = {tuple(draw_passages(make_row(4, 12, str(q)), 3, 0, 0)["label"]) for q in range(30)}
    assert min(map(len, (by_epoch, by_seed, by_row))) > 25


def test_every_passage_is_drawn_equally_often():
    """800 draws of 2 of 8: 200 of each expected, +- 12 for one standard deviation."""
    row = make_row(4, 8)
    positives, negatives = Counter(), Counter()
    for epoch in range(800):
        drawn = draw_passages(row, 2, 0, epoch)
        positives[drawn["positive"]] += 1
        negatives.update([drawn["negative_1"], drawn["negative_2"]])
    assert all(150 < count < 250 for count in positives.values())
    assert all(150 < count < 250 for count in negatives.values())
    assert (len(positives), len(negatives)) == (4, 8)


def test_draws_do_not_change_with_the_version():
    """A run resumed after an update goes on with the same draws."""
    drawn = draw_passages(make_row(4, 12), 4, seed=7, epoch=3)
    assert drawn["label"] == [0.5, -10.5, -8.5, -7.5, -5.5]
    assert [is_swapped("a", "b", 7, epoch) for epoch in range(8)] == [
        bool(bit) for bit in (1, 1, 0, 1, 1, 0, 1, 1)
    ]


def test_only_what_is_there_is_drawn():
    row = {"query": "q", "pos": ["p"], "neg": ["n"], "dataset_name": "set"}
    drawn = draw_passages(row, 1, 0, 0)
    assert drawn == {"query": "q", "positive": "p", "negative_1": "n", "dataset_name": "set"}
    assert draw_passages(row | {"neg": []}, 0) == {
        "query": "q",
        "positive": "p",
        "dataset_name": "set",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": []}, r"query 'q': 'pos' is empty"),
        ({"neg": [], "neg_q": [], "neg_scores": []}, r"query 'q': 'neg' is empty"),
        ({"neg_q": ["x"]}, r"'neg_q' must have one entry for each of 'neg'; it has 1 for 5"),
        ({"pos_scores": [1.0]}, r"'pos_scores' must have one .* 'pos'; it has 1 for 3"),
        ({"neg_scores": [1.0]}, r"'neg_scores' must have one .* 'neg'; it has 1 for 5"),
        ({"neg_q": None}, r"\['neg_q'\] must each hold a list; they hold nothing"),
    ],
)
def test_rows_that_nothing_can_be_drawn_from(change, message):
    with pytest.raises(ValueError, match=message):
        draw_passages(make_row() | change, 2, 0, 0)


def test_scores_of_one_side_only():
    row = make_row()
    del row["neg_scores"]
    with pytest.raises(ValueError, match="'pos_scores' and 'neg_scores' go together"):
        draw_passages(row, 2)


def test_swaps_are_fair_and_independent():
    """2,000 throws: 1,000 expected, 22 for one standard deviation; so are those of neighbours."""
    throws = [is_swapped(f"a{row}", "b", 0, epoch) for row in range(40) for epoch in range(50)]
    assert 900 < sum(throws) < 1100
    agree = sum(a == b for a, b in zip(throws[:-1], throws[1:], strict=True))
    assert 900 < agree < 1100
