"""Splits a dataset so that no document is on both sides.

Rows that share a document (the same answer, the same topic) are near copies of each other: split by
row, a model is tested on what it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.data import checks

if TYPE_CHECKING:
    from datasets import Dataset


def split_by(
    dataset: Dataset,
    columns: str | Sequence[str],
    *,
    fractions: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Dataset]:
    """Split a dataset so that no value of a column is in two splits.

    Rows are joined into groups: two rows are in one group where they share a value of any of the
    columns, directly or through other rows (the connected components). Groups are shuffled and
    stay whole.

    Args:
        dataset: with a length, not streaming.
        columns: one column or several, as ``["focus", "b"]``. Texts are compared exactly.
        fractions: {split: share of the rows}, adding up to 1; met to about half a group each.
        sizes: {split: rows} instead: exactly as many; of the group that a split ends in, and of
            the groups after the last split, rows are left out.
        seed: of the shuffle; the same seed gives the same splits.

    Returns:
        {split: dataset}, each in the order of the dataset given.

    Raises:
        ValueError: a column is missing; neither or both of `fractions` and `sizes`; fractions that
            are negative or do not add up to 1; too few rows or groups for a split, with how many
            there are; no rows.
    """
    names = [columns] if isinstance(columns, str) else list(columns)
    if not names:
        raise ValueError("columns: name at least one column to split by")
    checks.present(dict.fromkeys(dataset.column_names), names, "columns")
    if (fractions is None) == (sizes is None):
        raise ValueError("split_by takes either fractions or sizes")
    if len(dataset) == 0:
        raise ValueError("split_by: the dataset has no rows")
    groups = group_rows([dataset[name] for name in names])
    if sizes is not None:
        splits = _take(groups, sizes, seed)
    else:
        splits = assign_groups(groups, list((fractions or {}).values()), seed)
    chosen = {}
    for split, name in enumerate(sizes or fractions or ()):
        rows = np.flatnonzero(splits == split)
        if not len(rows):
            raise ValueError(
                f"split {name!r} gets no row: {len(dataset)} rows in {groups.max() + 1} groups by "
                f"{', '.join(names)} are too few or too unequal"
            )
        chosen[name] = dataset.select(rows)
    return chosen


def group_rows(columns: Sequence[Sequence[Any]]) -> NDArray[np.int64]:
    """[N] int64, the group of each row: rows are joined by an equal value in any column.

    Args:
        columns: each of length N, of hashable values.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(columns[0])
    # a graph of rows and values: a row is joined to each value that it has
    values: dict[tuple[int, Any], int] = {}
    edges = [
        values.setdefault((column, value), rows + len(values))
        for column, cells in enumerate(columns)
        for value in cells
    ]
    ends = (np.tile(np.arange(rows), len(columns)), np.asarray(edges, dtype=np.int64))
    nodes = rows + len(values)
    graph = coo_array((np.ones(len(edges), dtype=np.int8), ends), shape=(nodes, nodes))
    groups = connected_components(graph, directed=False)[1][:rows]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def assign_groups(
    groups: NDArray[np.int64], fractions: Sequence[float], seed: int | np.random.SeedSequence
) -> NDArray[np.int64]:
    """[N] int64, the split of each row; the rows of a group are in one split.

    The groups are laid end to end in random order, and each goes where its middle lies among the
    fractions: large and small ones alike, and no split is off by more than half a group at each of
    its ends.

    Args:
        groups: [N], 0 .. G-1, each in use.
        fractions: of the rows, adding up to 1.
        seed: of the order.

    Raises:
        ValueError: fractions that are negative or do not add up to 1.
    """
    check_fractions(fractions)
    order = np.random.default_rng(seed).permutation(groups.max(initial=-1) + 1)
    sizes = np.bincount(groups, minlength=len(order))[order]
    middles = (np.cumsum(sizes) - sizes / 2) / len(groups)
    ends = np.cumsum(fractions, dtype=np.float64)
    ends[np.flatnonzero(fractions)[-1] :] = np.inf  # rounding must not leave a group outside
    split_of_group = np.empty(len(order), dtype=np.int64)
    split_of_group[order] = np.searchsorted(ends, middles, side="right")
    return split_of_group[groups]


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ValueError unless all are finite and >= 0 and they add up to 1."""
    if any(not f >= 0 for f in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions must be >= 0 and add up to 1; got {list(fractions)}")


def _take(groups: NDArray[np.int64], sizes: Mapping[str, int], seed: int) -> NDArray[np.int64]:
    """[N] int64, the split of each row, -1 for none: groups in random order fill one by one."""
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = np.argsort(place[groups], kind="stable")  # whole groups, one after the other
    ends = np.flatnonzero(np.diff(place[groups][rows], append=-1)) + 1
    splits = np.full(len(groups), -1, dtype=np.int64)
    start = 0
    for split, (name, size) in enumerate(sizes.items()):
        if size < 1:
            raise ValueError(f"sizes[{name!r}] must be at least 1; got {size}")
        if start + size > len(rows):
            raise ValueError(
                f"sizes: {len(rows)} rows in {len(order)} groups are too few for {dict(sizes)}: "
                f"{len(rows) - start} are left for {name!r}"
            )
        splits[rows[start : start + size]] = split
        start = int(ends[np.searchsorted(ends, start + size)])  # the rest of the last group
    return splits
