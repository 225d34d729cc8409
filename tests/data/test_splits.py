from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")
from datasets import Dataset

from moe_fast.data import split_by
from moe_fast.data.splits import assign_groups, group_rows

HALVES = {"train": 0.5, "test": 0.5}


def _groups_by_merging(columns: list[list[int]]) -> list[set[int]]:
    """Groups of rows by the definition: a row joins all groups it shares a value with."""
    groups: list[tuple[set[int], set[tuple[int, int]]]] = []
    for row in range(len(columns[0])):
        joined = {row}, {(c, column[row]) for c, column in enumerate(columns)}
        for group in [group for group in groups if group[1] & joined[1]]:
            groups.remove(group)
            joined = joined[0] | group[0], joined[1] | group[1]
        groups.append(joined)
    return [rows for rows, _ in groups]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_groups_are_the_connected_components(rows: list[tuple[int, int]]):
    for columns in ([[r[0] for r in rows]], [[r[0] for r in rows], [r[1] for r in rows]]):
        groups = group_rows(columns)
        assert set(groups) == set(range(groups.max() + 1))
        ours = {frozenset(np.flatnonzero(groups == g).tolist()) for g in set(groups)}
        assert ours == {frozenset(group) for group in _groups_by_merging(columns)}


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.integers(0, 9),
)
def test_fractions_are_met_to_half_a_group_at_each_end(
    sizes: list[int], parts: list[int], seed: int
):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    fractions = [part / sum(parts) for part in parts]
    splits = assign_groups(groups, fractions, seed)
    for group in range(len(sizes)):
        assert len(set(splits[groups == group])) == 1
    ends = [np.isin(splits, range(k + 1)).sum() for k in range(len(fractions))]
    assert np.abs(ends - np.cumsum(fractions) * len(groups)).max() <= max(sizes) / 2 + 1e-6
    assert not any(f == 0 and (splits == k).any() for k, f in enumerate(fractions))


ROWS = Dataset.from_dict(
    {
        "b": [f"answer {i % 150}" for i in range(200)],
        "focus": [f"topic {i // 4}" for i in range(200)],
        "row": list(range(200)),
    }
)


@pytest.mark.parametrize("columns", ["focus", ["focus", "b"]])
@pytest.mark.parametrize(
    "shares",
    [
        {"fractions": {"train": 0.6, "dev": 0.2, "test": 0.2}},
        {"sizes": {"train": 90, "dev": 31, "test": 10}},
    ],
)
def test_no_value_is_in_two_splits_and_no_row_is_lost_or_copied(columns, shares):
    splits = split_by(ROWS, columns, seed=3, **shares)
    names = [columns] if isinstance(columns, str) else columns
    for column in names:
        values = [set(split[column]) for split in splits.values()]
        assert sum(map(len, values)) == len(set.union(*values))
    rows = [row for split in splits.values() for row in split["row"]]
    assert len(rows) == len(set(rows))
    assert all(list(split["row"]) == sorted(split["row"]) for split in splits.values())
    if "sizes" in shares:
        assert {name: len(split) for name, split in splits.items()} == shares["sizes"]
    else:
        assert len(rows) == len(ROWS)


def test_the_seed_decides():
    first, again, other = (
        list(split_by(ROWS, "focus", fractions=HALVES, seed=seed)["train"]["row"])
        for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": "topic", "fractions": HALVES}, r"column 'topic' is missing; .*\['b', 'focus'"),
        ({"columns": [], "fractions": HALVES}, "name at least one column"),
        ({"columns": "b"}, "takes either fractions or sizes"),
        ({"columns": "b", "fractions": HALVES, "sizes": {"x": 1}}, "takes either fractions or"),
        ({"columns": "b", "fractions": {"x": 0.5}}, r"fractions must .* add up to 1; got \[0.5\]"),
        ({"columns": "b", "fractions": {"x": 1.5, "y": -0.5}}, "fractions must be >= 0"),
        ({"columns": "b", "fractions": {"x": float("nan"), "y": 1}}, "fractions must be >= 0"),
        ({"columns": "b", "sizes": {"x": 0}}, r"sizes\['x'\] must be at least 1; got 0"),
        (
            {"columns": "b", "sizes": {"x": 150, "y": 100}},
            "200 rows in 150 groups are too few .*: 50 are left for 'y'",
        ),
        ({"columns": "b", "fractions": {"x": 1.0, "y": 0.0}}, "split 'y' gets no row: 200 rows in"),
    ],
)
def test_mistakes(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        split_by(ROWS, **arguments)


def test_one_group_cannot_be_split():
    with pytest.raises(ValueError, match="200 rows in 1 groups by f are too few or too unequal"):
        split_by(Dataset.from_dict({"f": ["x"] * 200}), "f", fractions=HALVES)
    with pytest.raises(ValueError, match="the dataset has no rows"):
        split_by(Dataset.from_dict({"f": []}), "f", fractions=HALVES)
