"""A data set's columns as lists, checked before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def read_columns(
    dataset: Any,
    required: Sequence[str],
    optional: Sequence[str] = (),
    argument: str = "dataset",
) -> dict[str, list[Any]]:
    """The named columns of a data set.

    Args:
        dataset: a ``datasets.Dataset`` or ``IterableDataset`` (which is read through once), or a
            mapping from names to sequences of one length.
        required, optional: the columns wanted; texts (``a``, ``b``) and ``domain`` must be strings
            that are not blank.
        argument: what messages call the data set.

    Returns:
        {name: values} of the required columns and of those optional ones that there are.

    Raises:
        ValueError: a required column is missing, there are no rows, columns of unequal length, or
            a text or a domain that is no string or blank.
    """
    columns = _columns(dataset)
    missing = [name for name in required if name not in columns]
    if missing:
        raise ValueError(
            f"{argument}: column {missing[0]!r} is missing; columns present: {sorted(columns)}"
        )
    chosen = {name: list(columns[name]) for name in (*required, *optional) if name in columns}
    lengths = {name: len(values) for name, values in chosen.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{argument}: columns must have one length; got {lengths}")
    if not any(lengths.values()):
        raise ValueError(f"{argument} has no rows")
    for name in {"a", "b", "domain"} & chosen.keys():
        _check_strings(chosen[name], f"{argument}, row {{}}: {name}")
    return chosen


def _columns(dataset: Any) -> Mapping[str, Any]:
    if isinstance(dataset, Mapping):
        return dataset
    if hasattr(dataset, "__len__"):
        return {name: dataset[name] for name in dataset.column_names}
    rows = list(dataset)
    names = rows[0].keys() if rows else ()
    return {name: [row[name] for row in rows] for name in names}


def _check_strings(values: Sequence[Any], where: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where.format(row)} must be a text; got {value!r}")
