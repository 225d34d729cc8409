"""Splits a dataset so that no document is in two splits.

Rows that share a document (the same answer, the same topic) are near copies of each other. If rows
were split at random, a model would be tested on texts that it was trained on.
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

    Rows are joined into groups: two rows are in one group if they share a value in any of the
    columns, directly or through other rows (connected components). Groups are shuffled, and no
    group is in two splits.

    Args:
        dataset: a dataset with a length, not a streaming one.
        columns: one column or several, such as ``["focus", "b"]``. Texts are compared exactly.
        fractions: {split: share of the rows}, adding up to 1. A split's size differs from its
            share by at most half a group at each of its ends.
        sizes: {split: exact number of rows}, instead of `fractions`. The rows of a group that do
            not fit into a split any more, and the groups after the last split, are left out.
        seed: of the shuffle; the same seed gives the same splits.

    Returns:
        {split: dataset}, each with its rows in the order of the dataset given.

    Raises:
        ValueError: no column is named, or a column is missing.
        ValueError: both or neither of `fractions` and `sizes` are given.
        ValueError: a fraction is negative, the fractions do not add up to 1, or a size is below 1.
        ValueError: there are no rows, or too few rows or groups for a split.
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
    """Group the rows that share a value in any column, directly or through other rows.

    Args:
        columns: one sequence of N hashable values per column.

    Returns:
        [N] int64: the group of each row, numbered from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(columns[0])
    # a graph whose nodes are rows and values, with an edge from a row to each of its values
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
    """Assign groups of rows to splits, each group as a whole.

    The groups are put in random order, one after the other, and the fractions divide this sequence
    of rows into intervals. A group belongs to the split whose interval contains the group's middle,
    so that a split is wrong by at most half a group at each of its ends.

    Args:
        groups: [N], the group of each row; every number 0 .. G-1 occurs.
        fractions: the shares of the rows, adding up to 1.
        seed: of the order of the groups.

    Returns:
        [N] int64: the split of each row, an index into `fractions`.

    Raises:
        ValueError: a fraction is negative, or they do not add up to 1.
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
    """Raise ValueError unless all fractions are at least 0 and they add up to 1."""
    if any(not f >= 0 for f in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions must be >= 0 and add up to 1; got {list(fractions)}")


def _take(groups: NDArray[np.int64], sizes: Mapping[str, int], seed: int) -> NDArray[np.int64]:
    """Fill the splits one after the other with groups in random order.

    Returns:
        [N] int64: the split of each row, an index into `sizes`; -1 for rows left out.

    Raises:
        ValueError: a size is below 1, or there are too few rows.
    """
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
